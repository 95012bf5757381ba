"""The segments that the bytes of an output file come from.

A segment knows its length, gives its bytes for any range, and tells which of them are not the base's; whoever reads
keeps the ranges small.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from pema_adapters.formats.safetensors_header import DTYPE_BYTES
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.io.input_file import Bytes, InputFile
from pema_adapters.merging.plan.dtype_cast import Rounding, cast

CHUNK = 4 << 20
BLOCK = 4096
"""Bytes of a file system's block, the unit in which it clones."""
Changes: TypeAlias = Iterator[tuple[int, Bytes]]


class Segment(Protocol):
    """Bytes of an output file."""

    @property
    def length(self) -> int:
        """How many."""

    @property
    def origin(self) -> "CopySegment | None":
        """The bytes of the base that these are, or are made of one for one; None where they are others."""

    def read(self, begin: int, end: int) -> Bytes:
        """Return those from `begin` to `end`, 0 <= begin <= end <= length, in fresh or mapped memory."""

    def changes(self) -> Changes:
        """Return `(offset, bytes)` of all that is not the origin's, in order, a few MB at most at a time."""


@dataclass(frozen=True)
class CopySegment:
    """`length` bytes of an input file from `start` on; `of_base`: they are the base's, rather than the delta's."""

    file: InputFile
    start: int
    length: int
    of_base: bool = True

    @classmethod
    def whole(cls, file: InputFile, of_base: bool = True) -> "CopySegment":
        """Return a segment of all bytes of a file."""
        return cls(file, 0, file.size, of_base)

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def origin(self) -> "CopySegment | None":
        """Itself, if these are bytes of the base."""
        return self if self.of_base else None

    def read(self, begin: int, end: int) -> bytes:
        """Read them where they lie."""
        return self.file.read(self.start + begin, self.start + end)

    def changes(self) -> Changes:
        """Return none, if these are bytes of the base; else all."""
        return iter(()) if self.of_base else chunks(self)


@dataclass(frozen=True)
class BytesSegment:
    """Bytes in memory: a header, a configuration, a tensor that had to be put in order."""

    data: Bytes
    origin = None

    @property
    def length(self) -> int:
        """Their number."""
        return len(self.data)

    def read(self, begin: int, end: int) -> memoryview:
        """Return a view of them."""
        return memoryview(self.data)[begin:end]

    def changes(self) -> Changes:
        """Return all of them."""
        return chunks(self)


@dataclass(frozen=True)
class CastSegment:
    """The numbers of another segment, of dtype `given`, rounded to `dtype` as they are read; `where` is for errors."""

    source: Segment
    given: str
    dtype: str
    rounding: Rounding
    where: str
    origin = None

    @classmethod
    def of(cls, tensor: StoredTensor, dtype: str, rounding: Rounding) -> "CastSegment":
        """Round a tensor of the delta to `dtype`."""
        where = f"{tensor.path}: tensor {tensor.name!r}"
        return cls(make_tensor_segment(tensor, of_base=False), tensor.dtype, dtype, rounding, where)

    @property
    def length(self) -> int:
        """Bytes after the cast."""
        return self.source.length // DTYPE_BYTES[self.given] * DTYPE_BYTES[self.dtype]

    def read(self, begin: int, end: int) -> memoryview:
        """Cast the numbers that the range touches."""
        target, given = DTYPE_BYTES[self.dtype], DTYPE_BYTES[self.given]
        first, last = begin // target, -(-end // target)
        raw = np.frombuffer(self.source.read(first * given, last * given), np.uint8)
        made = cast(raw, self.given, self.dtype, self.rounding, self.where)
        return made.data[begin - first * target : end - first * target]

    def changes(self) -> Changes:
        """Return all of them."""
        return chunks(self)


@dataclass(frozen=True)
class RowsSegment:
    """A matrix of the base with K rows spliced in: row `token_ids[k]` comes from row k of `rows`.

    `base` are the V rows as they were; ids from V on make the matrix grow, one after another without a gap.
    """

    base: Segment
    rows: Segment
    token_ids: np.ndarray = field(compare=False)
    row_bytes: int

    @cached_property
    def length(self) -> int:
        """Bytes of all rows, added ones included."""
        after = int(self.token_ids[-1]) + 1 if len(self.token_ids) else 0
        return max(self.base.length, after * self.row_bytes)

    @property
    def origin(self) -> CopySegment | None:
        """The matrix as it was."""
        return self.base.origin

    def read(self, begin: int, end: int) -> bytearray:
        """Return base bytes with the rows that the range touches laid over them."""
        data = bytearray(end - begin)
        old = min(end, self.base.length)
        if begin < old:
            data[: old - begin] = self.base.read(begin, old)
        size = self.row_bytes
        first, last = np.searchsorted(self.token_ids, (begin // size, -(-end // size)))
        for k in range(first, last):
            at = int(self.token_ids[k]) * size
            low, high = max(at, begin), min(at + size, end)
            data[low - begin : high - begin] = self.rows.read(k * size + low - at, k * size + high - at)
        return data

    def changes(self) -> Changes:
        """Yield the rows; those that lie side by side together."""
        size = self.row_bytes
        step = max(1, CHUNK // size)
        for begin in range(0, len(self.token_ids), step):
            ids = self.token_ids[begin : begin + step]
            block = self.rows.read(begin * size, (begin + len(ids)) * size)
            first = np.flatnonzero(np.diff(ids, prepend=-2) != 1)  # of each run; plain lists are quicker to walk
            offsets, breaks = (ids[first] * size).tolist(), [*(first * size).tolist(), len(ids) * size]
            for offset, (low, high) in zip(offsets, pairwise(breaks), strict=True):
                yield offset, block[low:high]


def make_tensor_segment(tensor: StoredTensor, *, of_base: bool) -> CopySegment | BytesSegment:
    """Return the bytes of a tensor where they lie; in memory if a pickle has them in another order."""
    if tensor.start is None:
        return BytesSegment(tensor.read())
    return CopySegment(tensor.source, tensor.start, tensor.nbytes, of_base)


def chunks(segment: Segment) -> Changes:
    """Yield `(offset, bytes)` of a whole segment, a chunk at a time."""
    for begin in range(0, segment.length, CHUNK):
        yield begin, segment.read(begin, min(begin + CHUNK, segment.length))


def merge_segments(segments: list[Segment]) -> tuple[Segment, ...]:
    """Return the same bytes in fewer segments: adjacent copies become one, empty ones are dropped."""
    made: list[Segment] = []
    for segment in segments:
        last = made[-1] if made else None
        if isinstance(last, CopySegment) and isinstance(segment, CopySegment) and _continues(last, segment):
            made[-1] = replace(last, length=last.length + segment.length)
        elif segment.length:
            made.append(segment)
    return tuple(made)


def _continues(first: CopySegment, second: CopySegment) -> bool:
    same = first.file is second.file and first.of_base == second.of_base
    return same and first.start + first.length == second.start
