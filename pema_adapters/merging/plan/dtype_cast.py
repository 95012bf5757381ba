"""Numbers from one floating-point dtype to another, and how far they moved."""

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.formats.safetensors_header import NUMPY_DTYPES, as_float32


class Rounding:
    """The largest absolute rounding error seen so far; every cast of one plan reports to the same."""

    def __init__(self) -> None:
        self.largest = 0.0

    def note(self, error: float) -> None:
        """Take one more error into account."""
        self.largest = max(self.largest, error)


def cast(raw: np.ndarray, source: str, target: str, rounding: Rounding, where: str) -> np.ndarray:
    """Convert bytes uint8 [n] of dtype `source` to dtype `target`, rounded to nearest, ties to even.

    Raises `MergeError`, naming `where`, if a finite number has no finite counterpart.
    """
    return downcast_tracked(upcast(raw, source), target, rounding, where)


def downcast_tracked(values: np.ndarray, target: str, rounding: Rounding, where: str) -> np.ndarray:
    """Convert numbers [n] to bytes of dtype `target` and record their rounding; raises as `cast` does."""
    if target in NUMPY_DTYPES and values.dtype == NUMPY_DTYPES[target]:
        return np.ascontiguousarray(values).view(np.uint8)
    made = downcast(values, target)
    back = upcast(made, target)
    finite = np.isfinite(values)
    if not np.isfinite(back[finite]).all():
        largest = np.abs(values[finite]).max()
        raise MergeError(f"{where}: a value of {largest:g} is too large for the dtype {target}; nothing was written")
    if finite.any():
        rounding.note(float(np.abs(values[finite].astype(np.float64) - back[finite]).max()))
    return made


def upcast(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Convert bytes to float64 for F64, float32 for the rest: exact."""
    return raw.view("<f8") if dtype == "F64" else as_float32(raw, dtype)


def downcast(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert numbers to the nearest of `dtype`, as bytes; too large ones become infinite."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype(NUMPY_DTYPES[dtype]).view(np.uint8)
        return _to_bfloat16(values.astype("<f4", copy=False)).view(np.uint8)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the upper halves of float32 [n] as uint16, rounded by adding just under half of the last place kept."""
    bits = np.ascontiguousarray(values).view("<u4")
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2")
