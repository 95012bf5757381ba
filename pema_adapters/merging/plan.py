"""The plan of a merge: for every output file, the segments that its bytes come from.

Writing it to disk, dry-running it, verifying it and presenting it as a file object are readers of the same plan. A
segment knows its length and gives its bytes for any range; whoever reads keeps the ranges small.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from pema_adapters.errors import FormatError
from pema_adapters.formats.safetensors_file import DTYPE_BYTES
from pema_adapters.formats.tensors import Stored
from pema_adapters.merging.casting import Rounding, cast

CHUNK = 4 << 20
Bytes: TypeAlias = "bytes | bytearray | memoryview"


class Segment(Protocol):
    """Bytes of an output file."""

    @property
    def length(self) -> int:
        """How many."""

    def read(self, begin: int, end: int) -> Bytes:
        """Those from `begin` to `end`, 0 <= begin <= end <= length, in fresh or mapped memory."""


@dataclass(frozen=True)
class Copy:
    """`length` bytes of the file `path` from `start` on."""

    path: Path
    start: int
    length: int

    def read(self, begin: int, end: int) -> bytes:
        """Read them where they lie."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            parts, at = [], self.start + begin
            while at < self.start + end:
                part = os.pread(fd, self.start + end - at, at)
                if not part:
                    raise FormatError(f"{self.path}: ends at byte {at}; the file became shorter during the merge")
                parts.append(part)
                at += len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Literal:
    """Bytes at hand: a header, a configuration, or a tensor of the delta in its memory map."""

    data: Bytes

    @property
    def length(self) -> int:
        """Their number."""
        return len(self.data)

    def read(self, begin: int, end: int) -> memoryview:
        """A view of them."""
        return memoryview(self.data)[begin:end]


@dataclass(frozen=True)
class Cast:
    """A tensor of the delta, rounded to `dtype` as it is read."""

    tensor: Stored
    dtype: str
    rounding: Rounding

    @property
    def length(self) -> int:
        """Bytes after the cast."""
        return math.prod(self.tensor.shape) * DTYPE_BYTES[self.dtype]

    def read(self, begin: int, end: int) -> memoryview:
        """Cast the numbers that the range touches."""
        target, source = DTYPE_BYTES[self.dtype], DTYPE_BYTES[self.tensor.dtype]
        first, last = begin // target, -(-end // target)
        where = f"{self.tensor.path}: tensor {self.tensor.name!r}"
        raw = self.tensor.raw[first * source : last * source]
        made = cast(raw, self.tensor.dtype, self.dtype, self.rounding, where)
        return made.data[begin - first * target : end - first * target]

    def measure(self) -> None:
        """Cast everything for the sake of its rounding error alone."""
        for begin in range(0, self.length, CHUNK):
            self.read(begin, min(begin + CHUNK, self.length))


@dataclass(frozen=True)
class Rows:
    """A matrix of the base with K rows spliced in: row `token_ids[k]` comes from row k of `rows`.

    `base` are the V rows as they were; ids from V on make the matrix grow, one after another without a gap.
    """

    base: Copy
    rows: Literal | Cast
    token_ids: np.ndarray = field(compare=False)
    row_bytes: int

    @cached_property
    def length(self) -> int:
        """Bytes of all rows, added ones included."""
        after = int(self.token_ids[-1]) + 1 if len(self.token_ids) else 0
        return max(self.base.length, after * self.row_bytes)

    def read(self, begin: int, end: int) -> bytearray:
        """Base bytes with the rows that the range touches laid over them."""
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

    def runs(self) -> Iterator[tuple[int, Bytes]]:
        """`(offset, bytes)` of rows that lie side by side, in order, a chunk at most at a time."""
        size = self.row_bytes
        step = max(1, CHUNK // size)
        for begin in range(0, len(self.token_ids), step):
            ids = self.token_ids[begin : begin + step]
            block = self.rows.read(begin * size, (begin + len(ids)) * size)
            first = np.flatnonzero(np.diff(ids, prepend=-2) != 1)  # of each run; plain lists are quicker to walk
            offsets, breaks = (ids[first] * size).tolist(), [*(first * size).tolist(), len(ids) * size]
            for offset, (low, high) in zip(offsets, pairwise(breaks), strict=True):
                yield offset, block[low:high]


@dataclass(frozen=True)
class PlannedFile:
    """A file of the output: `name` relative to the output folder, and what its bytes are."""

    name: str
    segments: tuple[Segment, ...]

    @cached_property
    def starts(self) -> list[int]:
        """Where each segment begins, and where the last one ends."""
        return list(accumulate((segment.length for segment in self.segments), initial=0))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.starts[-1]

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`, whatever segments they are in."""
        parts = []
        at, i = begin, bisect_right(self.starts, begin) - 1
        while at < min(end, self.size):
            start, stop = self.starts[i], min(self.starts[i + 1], end)
            if at < stop:
                parts.append(self.segments[i].read(at - start, stop - start))
            at, i = max(at, stop), i + 1
        return b"".join(parts)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """`(offset, bytes)` of the whole file, a chunk at a time."""
        for begin in range(0, self.size, CHUNK):
            yield begin, self.read(begin, min(begin + CHUNK, self.size))


@dataclass(frozen=True)
class Plan:
    """Every file of the output, and what there is to say about them.

    Counts are of tensors; `vocab_size` is V of the output. `rounding` fills while the plan is read.
    """

    files: tuple[PlannedFile, ...]
    rounding: Rounding
    rows_merged: int
    vocab_size: int
    tensors_changed: int
    tensors_copied: int
    adapters_left: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def casts(self) -> Iterator[Cast]:
        """Every segment whose bytes are rounded."""
        for file in self.files:
            for segment in file.segments:
                inner = segment.rows if isinstance(segment, Rows) else segment
                if isinstance(inner, Cast):
                    yield inner


def joined(segments: list[Segment]) -> tuple[Segment, ...]:
    """The same bytes in fewer segments: copies that continue each other become one, empty ones go."""
    made: list[Segment] = []
    for segment in segments:
        last = made[-1] if made else None
        if isinstance(last, Copy) and isinstance(segment, Copy) and _continues(last, segment):
            made[-1] = Copy(last.path, last.start, last.length + segment.length)
        elif segment.length:
            made.append(segment)
    return tuple(made)


def _continues(first: Copy, second: Copy) -> bool:
    return first.path == second.path and first.start + first.length == second.start
