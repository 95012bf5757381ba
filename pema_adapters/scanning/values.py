"""Extract integers from the values of a row: lists, ragged or not, arrays, tensors on any device, numbers."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer[Any]]

INT64 = np.iinfo(np.int64)
NO_IDS: Integers = np.empty(0, dtype=np.int64)


class NotIdsError(Exception):
    """A value is not an integer; the message says what it is."""


def iterate_integers(value: Any) -> Iterator[tuple[int | None, Integers]]:
    """Iterate over the integers of a value; `None`s are skipped.

        [3, 5]          ->  (None, [3, 5])
        [[3, 5], [7]]   ->  (0, [3, 5]), (1, [7])

    Yields:
        Pairs (position in the outermost list, integer array of any shape); the position is None for a flat list and
        for an array.

    Raises:
        NotIdsError: the value holds something else than integers.
    """
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        present = [part for part in value if part is not None]
        flat = _convert_flat_list(present)
        if flat is not None:
            yield None, flat
            return
        for position, part in enumerate(value):
            at = None if isinstance(part, (int, np.integer)) else position
            yield from ((at, ids) for _, ids in iterate_integers(part))
    elif value is not None:
        array = _convert_array(value)
        if array.dtype.kind == "O":
            yield from iterate_integers(array.tolist())
        else:
            yield None, array


def _convert_flat_list(values: Sequence[Any]) -> Integers | None:
    """Convert a flat list of integers; return None for nested lists and for integers that NumPy cannot hold."""
    if not values:
        return NO_IDS
    if not isinstance(values[0], (int, np.integer)):
        return None
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        return None
    return _normalize(array) if array.ndim == 1 and array.dtype.kind in "iu" else None


def _convert_array(value: Any) -> npt.NDArray[Any]:
    if hasattr(value, "detach"):  # a torch tensor on any device
        value = value.detach().cpu()
        if value.is_floating_point():  # bfloat16 has no NumPy counterpart
            raise NotIdsError(f"{value.dtype} values")
        value = value.numpy()
    elif isinstance(value, int):
        value = min(max(value, INT64.min), INT64.max)
    elif not hasattr(value, "__array__"):
        raise NotIdsError(f"a {type(value).__name__} ({str(value)[:40]!r})")
    array = np.asarray(value)
    if not array.size:
        return NO_IDS
    if array.dtype.kind not in "iuO":
        raise NotIdsError(f"{array.dtype} values (first: {array.flat[0]!r})")
    return array if array.dtype.kind == "O" else _normalize(array)


def _normalize(array: npt.NDArray[Any]) -> Integers:
    """Convert to native byte order, and clip uint64 to the range of int64, so that no view turns negative."""
    if array.dtype == np.uint64:
        array = np.minimum(array, np.uint64(INT64.max)).astype(np.int64)
    plain: Integers = array.astype(array.dtype.newbyteorder("="), copy=False)
    return plain
