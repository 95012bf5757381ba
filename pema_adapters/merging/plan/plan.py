"""The plan of a merge: for every output file, the segments that its bytes come from.

Writing it to disk, dry-running it, verifying it and presenting it as a file object are readers of the same plan.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from pema_adapters.merging.plan.dtype_cast import Rounding
from pema_adapters.merging.plan.segments import CHUNK, BytesSegment, CopySegment, RowsSegment, Segment, chunks

WRITE_ANEW = "write a new checkpoint with --output"
"""The way out where a merge in place is refused."""


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
        """Return the bytes from `begin` to `end`, whatever segments they are in."""
        parts = []
        at, i = begin, bisect_right(self.starts, begin) - 1
        while at < min(end, self.size):
            start, stop = self.starts[i], min(self.starts[i + 1], end)
            if at < stop:
                parts.append(self.segments[i].read(at - start, stop - start))
            at, i = max(at, stop), i + 1
        return b"".join(parts)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield `(offset, bytes)` of the whole file, a chunk at a time."""
        for begin in range(0, self.size, CHUNK):
            yield begin, self.read(begin, min(begin + CHUNK, self.size))

    def patches(self, path: Path) -> bool:
        """Return whether the file is `path` with some bytes replaced and all others in place."""
        kept = zip(self.starts, self.segments, strict=False)
        same_places = all(
            (origin.path, origin.start, origin.length) == (path, start, segment.length)
            for start, segment in kept
            if (origin := segment.origin) is not None
        )
        return same_places and self.size == path.stat().st_size


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
    tensors_folded: int
    tensors_copied: int
    adapters_left: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files."""
        return tuple(file.name for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def measure(self) -> None:
        """Compute whatever is rounded, for the sake of its rounding error alone."""
        for file in self.files:
            for segment in file.segments:
                for part in (segment.base, segment.rows) if isinstance(segment, RowsSegment) else (segment,):
                    if not isinstance(part, CopySegment | BytesSegment):
                        deque(chunks(part), maxlen=0)
