"""Folding: what a weight-space method does to one weight of the base, computed a block of rows at a time.

Every such method is `W' = scale * (W + scaling * left @ right)` for a weight W [out, in], row by row.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.formats.safetensors_header import DTYPE_BYTES
from pema_adapters.io.input_file import Bytes
from pema_adapters.merging.folding.adapter_layers import AdaptedLinear
from pema_adapters.merging.plan.dtype_cast import Rounding, downcast_tracked, upcast
from pema_adapters.merging.plan.segments import CHUNK, Changes, CopySegment, Segment

QKV = ("q", "k", "v")
"""The parts of a merged attention projection, in the order in which adapters stacks them."""


@dataclass(frozen=True, eq=False)
class WeightUpdate:
    """What the adapter does to a weight [out, in].

    left [out, r] and right [r, in]: LoRA's B and A; None for both in (IA)^3. scale: (IA)^3's vector [out, 1], or None.
    magnitude: DoRA's m [out, 1], or None; then scale is m / |W + left @ right|, row by row (adapters takes the norm
    without scaling). transposed: the weight is stored as [in, out], as in GPT-2.
    """

    left: np.ndarray | None
    right: np.ndarray | None
    scaling: float
    scale: np.ndarray | None
    magnitude: np.ndarray | None
    transposed: bool

    def apply(self, weight: np.ndarray, first: int) -> np.ndarray:
        """Return the stored rows `weight` [n, ...], the first of which is row `first`, with the update applied."""
        made = weight
        if self.left is not None and self.right is not None:
            made = weight + self._compute_update(first, len(weight)) * self.scaling
        if self.transposed:
            return made if self.scale is None else made * self.scale.T
        factor = self.factor(weight, first)
        return made if factor is None else made * factor

    def factor(self, weight: np.ndarray, first: int) -> np.ndarray | None:
        """Return the factor [n, 1] of the outputs of these rows; None for 1. The layer multiplies its bias as well."""
        rows = slice(first, first + len(weight))
        if self.magnitude is None:
            return None if self.scale is None else self.scale[rows]
        norm = np.linalg.norm(weight + self._compute_update(first, len(weight)), axis=1, keepdims=True)
        made: np.ndarray = self.magnitude[rows] / norm
        return made

    @property
    def scales_bias(self) -> bool:
        """Whether the bias of the layer changes."""
        return self.scale is not None or self.magnitude is not None

    def _compute_update(self, first: int, count: int) -> np.ndarray:
        """Return these rows of `left @ right`, as the weight is stored."""
        assert self.left is not None and self.right is not None
        rows = slice(first, first + count)
        left, right = (self.right[:, rows].T, self.left.T) if self.transposed else (self.left[rows], self.right)
        made: np.ndarray = np.matmul(left, right)
        return made


class FoldCache(threading.local):
    """What each thread computed last for a plan: a block, because readers' ranges end in the middle, and an update."""

    def __init__(self) -> None:
        self.block: tuple[tuple[int, int], Bytes] | None = None
        self.update: tuple[int, WeightUpdate] | None = None


@dataclass(frozen=True, eq=False)
class FoldedWeight:
    """A weight of the base with the update of `layer` folded in, in the dtype `dtype`.

    Blocks of rows begin at fixed rows, so that every reader gets the same bits, whatever range it asks for.
    """

    base: Segment
    given: str
    shape: tuple[int, ...]
    layer: AdaptedLinear
    transposed: bool
    dtype: str
    rounding: Rounding
    where: str
    cache: FoldCache

    @property
    def update(self) -> WeightUpdate:
        """The update, read from the delta when a thread needs it, and kept until it needs another."""
        cached = self.cache.update
        if cached is None or cached[0] != id(self):
            cached = self.cache.update = id(self), plan_update(self.layer, self.shape, self.transposed)
        return cached[1]

    @property
    def length(self) -> int:
        """Bytes of the weight in `dtype`."""
        return self.shape[0] * self._row_bytes

    @property
    def origin(self) -> CopySegment | None:
        """The weight as it was."""
        return self.base.origin if self.dtype == self.given else None

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * DTYPE_BYTES[self.dtype]

    @property
    def _step(self) -> int:
        return max(1, CHUNK // (self.shape[1] * 4))

    def read(self, begin: int, end: int) -> bytes:
        """Compute the blocks that the range touches."""
        size = self._row_bytes * self._step
        parts = []
        for number in range(begin // size, -(-end // size)):
            low, high = max(begin - number * size, 0), min(end - number * size, size)
            parts.append(bytes(memoryview(self._block(number))[low:high]))
        return b"".join(parts)

    def changes(self) -> Changes:
        """Yield block by block: each is computed before its bytes may be overwritten."""
        for number in range(-(-self.shape[0] // self._step)):
            yield number * self._step * self._row_bytes, self._block(number)

    def weights(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(first row, rows)` of the base's weight, as numbers, block by block."""
        for first in range(0, self.shape[0], self._step):
            yield first, self.weight(first)

    def weight(self, first: int) -> np.ndarray:
        """Return a block of rows of the base's weight, from row `first` on."""
        size = self.shape[1] * DTYPE_BYTES[self.given]
        last = min(first + self._step, self.shape[0])
        raw = np.frombuffer(self.base.read(first * size, last * size), np.uint8)
        return upcast(raw, self.given).reshape(last - first, -1)

    def _block(self, number: int) -> Bytes:
        """Return the bytes of a block of rows."""
        key, cached = (id(self), number), self.cache.block
        if cached is None or cached[0] != key:
            cached = self.cache.block = key, self._compute_block(number)
        return cached[1]

    def _compute_block(self, number: int) -> Bytes:
        first = number * self._step
        weight = self.weight(first)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            made = self.update.apply(weight, first)
        if not np.isfinite(made).all() and np.isfinite(weight).all():
            raise MergeError(
                f"{self.where}: with the delta folded in, a value is too large for {made.dtype}; nothing was written"
            )
        return downcast_tracked(made.reshape(-1), self.dtype, self.rounding, self.where).data


def fold_bias(folded: FoldedWeight, raw: np.ndarray, given: str, dtype: str) -> bytes:
    """Multiply the bias [out] of the layer as its outputs are; adapters' own merge_adapter leaves it as it was."""
    values = upcast(raw, given)
    factors = [folded.update.scale] if folded.update.transposed else _factors(folded)
    factor = np.concatenate([part.reshape(-1) for part in factors if part is not None])
    made = (values * factor).astype(values.dtype, copy=False)
    return downcast_tracked(made, dtype, folded.rounding, folded.where).tobytes()


def _factors(folded: FoldedWeight) -> list[np.ndarray | None]:
    return [folded.update.factor(weight, first) for first, weight in folded.weights()]


def plan_update(layer: AdaptedLinear, shape: tuple[int, ...], transposed: bool) -> WeightUpdate:
    """Return the update of a weight of `shape`, as stored. Raises `MergeError` where the parts do not fit it."""
    out, width = shape[::-1] if transposed else shape
    is_scale = "lora_A" not in layer.parts and "vera_D" not in layer.parts
    scaling = layer.method["alpha"] / (1 if is_scale else layer.method["r"])
    left, right = _matrices(layer)
    left = _place_parts(left, right, _find_adapted_parts(layer, out, left, right), out)
    magnitude = layer.values("m.weight") if "m.weight" in layer.parts else None
    _check(layer, shape, left, right, magnitude if not transposed else None, (out, width))
    if right is None:
        return WeightUpdate(None, None, 1.0, left * np.asarray(scaling, left.dtype), None, transposed)
    return WeightUpdate(left, right, scaling, None, magnitude, transposed)


def _check(  # noqa: PLR0913, PLR0917 - everything that must agree
    layer: AdaptedLinear,
    stored: tuple[int, ...],
    left: np.ndarray,
    right: np.ndarray | None,
    magnitude: np.ndarray | None,
    shape: tuple[int, int],
) -> None:
    inner, outer = (1, shape[1:]) if right is None else (right.shape[0], right.shape[1:])
    fits = left.shape == (shape[0], inner) and outer == shape[1:]
    if "m.weight" in layer.parts:
        fits = fits and magnitude is not None and magnitude.shape == (shape[0], 1)
    if not fits:
        found = ", ".join(f"{name} {list(part.shape)}" for name, part in layer.parts.items())
        raise MergeError(
            f"{layer.path}: {layer.module}: {found} cannot be folded into the base's weight {list(stored)}; "
            "give the base that the adapter was trained on"
        )


def _matrices(layer: AdaptedLinear) -> tuple[np.ndarray, np.ndarray | None]:
    """Return left [.., r] and right [r, ..]; for (IA)^3 its vector [.., 1] and None."""
    if any(len(part.shape) != 2 for part in layer.parts.values()):
        found = ", ".join(f"{name} {list(part.shape)}" for name, part in layer.parts.items())
        raise MergeError(f"{layer.path}: {layer.module}: expected matrices, found {found}; the file is damaged")
    if "vera_D" in layer.parts:
        return _vera(layer)
    return layer.values("lora_B"), layer.values("lora_A") if "lora_A" in layer.parts else None


def _vera(layer: AdaptedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Return `vera_B @ B @ vera_D`, multiplied in adapters' order, and A; all layers share A and B."""
    chain = [layer.values(part) for part in ("vera_B", "shared.lora_B", "vera_D", "shared.lora_A")]
    if any(one.shape[1] != other.shape[0] for one, other in pairwise(chain)):
        found = " @ ".join(str(list(matrix.shape)) for matrix in chain)
        raise MergeError(f"{layer.path}: {layer.module}: VeRA's {found} cannot be multiplied; the file is damaged")
    return (chain[0] @ chain[1]) @ chain[2], chain[3]


def _find_adapted_parts(layer: AdaptedLinear, out: int, left: np.ndarray, right: np.ndarray | None) -> list[int]:
    """Return which of q, k, v are adapted in a merged projection [3 * n, in], by number; [] for an ordinary layer."""
    named = layer.method.get("attn_matrices")
    parts = [i for i, key in enumerate(QKV) if isinstance(named, list) and key in named]
    rank = left.shape[1]
    is_merged = len(left) * 3 == out * len(parts) and (right is None or len(right) == rank * len(parts))
    is_ordinary = len(left) == out and (right is None or len(right) == rank)
    return parts if is_merged and not is_ordinary else []


def _place_parts(left: np.ndarray, right: np.ndarray | None, parts: list[int], out: int) -> np.ndarray:
    """Return `left` for a whole merged projection: each part's B in its own rows and in the columns of its own A."""
    if not parts:
        return left
    size, rank = out // 3, left.shape[1]
    made = np.full((out, rank * (1 if right is None else len(parts))), right is None, left.dtype)
    for i, part in enumerate(parts):
        columns = slice(0, rank) if right is None else slice(i * rank, (i + 1) * rank)
        made[part * size : (part + 1) * size, columns] = left[i * size : (i + 1) * size]
    return made
