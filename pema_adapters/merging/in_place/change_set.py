"""What a merge in place does to each file of its base, or why it cannot."""

import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.io.input_file import InputFile
from pema_adapters.merging.plan.plan import WRITE_ANEW, Plan, PlannedFile
from pema_adapters.merging.plan.segments import CHUNK, BytesSegment, CopySegment, RowsSegment, Segment, chunks

WEIGHTS = ".safetensors"
MAX_REPLACED = 64 << 20


@dataclass(frozen=True)
class ChangeSet:
    """What a merge does to its base. `patched`: by name, ranges int64 [n, 2] of (offset, length), none overlapping.

    renamed: `{name in the base: name in the output}` of files that keep their bytes, but for the ranges.
    """

    patched: dict[str, np.ndarray]
    replaced: tuple[PlannedFile, ...]
    created: tuple[PlannedFile, ...]
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def new(self) -> tuple[PlannedFile, ...]:
        """The files that are written whole."""
        return self.replaced + self.created

    def name_in_base(self, name: str) -> str:
        """Return what the output's file `name` is called in the base."""
        return next((old for old, new in self.renamed.items() if new == name), name)

    def touches(self, name: str) -> bool:
        """Return whether the output's file `name` is written."""
        return self.name_in_base(name) in self.patched or any(file.name == name for file in self.new)

    @property
    def journal_size(self) -> int:
        """Bytes that the journal takes until the merge is done, without those of `journal.json`."""
        ranges = sum(int(found[:, 1].sum()) + 24 * len(found) for found in self.patched.values())
        return ranges + sum(file.size for file in self.new) + CHUNK


def plan_changes(plan: Plan, base: Path) -> ChangeSet:
    """Decide for every file of the plan. Raises `MergeError`."""
    patched: dict[str, np.ndarray] = {}
    renamed: dict[str, str] = {}
    replaced, created = [], []
    for file in plan.files:
        path = base / file.name
        if not path.exists() and not path.is_symlink():
            source = _find_source(file, base)
            if source is None:
                created.append(file)
                continue
            _check_own(source, base)
            patched[source.name], renamed[source.name] = _find_changed_ranges(file, source), _safe_name(file, base)
        elif file.name.endswith(WEIGHTS) and path.is_file() and _can_be_patched(file, path):
            ranges = _find_changed_ranges(file, path)
            if len(ranges):
                _check_own(path, base)
                patched[file.name] = ranges
        elif not _is_content_equal(file, path):
            _check_replaceable(file, path)
            _check_own(path, base)
            replaced.append(file)
    for file in created:
        _check_created(file, base, patched)
    in_order = dict(sorted(patched.items()))  # as it is after a way through JSON
    return ChangeSet(in_order, tuple(replaced), tuple(created), renamed)


def is_safe(base: Path, name: str) -> bool:
    """Return whether `name` lies in `base` without a link on the way: a journal may come with a base from anybody."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts:
        return False
    return not any(base.joinpath(*parts[:depth]).is_symlink() for depth in range(1, 1 + len(parts)))


def _find_source(file: PlannedFile, base: Path) -> Path | None:
    """Return the base's file that becomes this one with its tensors in place; None if there is none."""
    origins = {segment.origin.path for segment in file.segments if segment.origin is not None}
    if not file.name.endswith(WEIGHTS) or len(origins) != 1:
        return None
    path = origins.pop()
    is_one = path.parent == base and path.suffix == WEIGHTS and path.is_file()
    return path if is_one and _can_be_patched(file, path) else None


def _can_be_patched(file: PlannedFile, path: Path) -> bool:
    return file.patches(path) and not any(_is_remade(segment) for segment in file.segments)


def _is_remade(segment: Segment) -> bool:
    """Return whether bytes that do not count as changes are made from others of the base, in another dtype, say."""
    if isinstance(segment, RowsSegment):
        return not isinstance(segment.base, CopySegment)
    return segment.origin is None and _reads_origin(segment) is not None


def _reads_origin(segment: Segment) -> CopySegment | None:
    """Return the file that a segment is made from in the end, if any."""
    while segment.origin is None:
        below = getattr(segment, "base", None) or getattr(segment, "source", None)
        if below is None:
            return None
        segment = below
    return segment.origin


def _safe_name(file: PlannedFile, base: Path) -> str:
    if not is_safe(base, file.name):
        raise MergeError(f"{base / file.name}: would lie outside of the base, or behind a link; {WRITE_ANEW}")
    return file.name


def _check_created(file: PlannedFile, base: Path, patched: dict[str, np.ndarray]) -> None:
    """Refuse new files with weights that the base still holds: it would hold them twice."""
    _safe_name(file, base)
    if file.name.endswith(WEIGHTS):
        for origin in filter(None, map(_reads_origin, file.segments)):
            if base in origin.path.parents and not _is_gone(origin, patched):
                raise _moved_error(origin.path, f"to {file.name}")


def _is_gone(origin: CopySegment, patched: dict[str, np.ndarray]) -> bool:
    """Return whether a longer header overwrites all of these bytes where they lay."""
    ranges = patched.get(origin.path.name, np.empty((0, 2), np.int64))
    return bool(((ranges[:, 0] <= origin.start) & (ranges.sum(axis=1) >= origin.start + origin.length)).any())


def _check_replaceable(file: PlannedFile, path: Path) -> None:
    if not path.is_file():
        raise MergeError(f"{path}: not a file, but the merge writes one of that name; {WRITE_ANEW}")
    size = path.stat().st_size
    if file.name.endswith(WEIGHTS):
        raise _moved_error(path, f"{size} bytes -> {file.size} bytes" if size != file.size else "or change their dtype")
    if max(size, file.size) >= MAX_REPLACED:
        raise MergeError(f"{path}: {max(size, file.size)} bytes are too many to be replaced in place; {WRITE_ANEW}")


def _moved_error(path: Path, how: str) -> MergeError:
    return MergeError(f"{path}: cannot be merged in place: its tensors would move ({how}); {WRITE_ANEW}")


def _check_own(path: Path, base: Path) -> None:
    """Refuse a file that others see change too, or that cannot be written."""
    if not is_safe(base, path.relative_to(base).as_posix()):
        raise MergeError(
            f"{path}: is a link, to the Hub's cache for example, and others would change with it; "
            f"copy the folder first, or {WRITE_ANEW}"
        )
    links = path.stat().st_nlink
    if links > 1:
        raise MergeError(
            f"{path}: has {links} names (hard links), and the others would change with it; "
            f"copy the folder first, or {WRITE_ANEW}"
        )
    if not os.access(path, os.W_OK):
        raise MergeError(f"{path}: not writable, so it cannot be merged in place; {WRITE_ANEW}")


def _is_content_equal(file: PlannedFile, path: Path) -> bool:
    """Return whether the file is what it is planned to be."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if all(segment.origin is segment for segment in file.segments) and file.patches(path):
        return True
    there = InputFile(path)
    return all(there.read(begin, begin + len(data)) == data for begin, data in file.chunks())


def _find_changed_ranges(file: PlannedFile, path: Path) -> np.ndarray:
    """Return where the file changes: int64 [n, 2] of (offset, length), adjacent ones joined."""
    found = [np.empty((0, 2), np.int64)]
    for start, segment in find_changed_segments(file, path):
        if isinstance(segment, RowsSegment):  # rather than `changes`, which would compute what is cast
            ids = np.asarray(segment.token_ids, np.int64)
            found.append(np.stack((start + ids * segment.row_bytes, np.full(len(ids), segment.row_bytes)), axis=1))
        else:
            found.append(np.array([[start, segment.length]], np.int64))
    return _merge_ranges(np.concatenate(found))


def find_changed_segments(file: PlannedFile, path: Path) -> list[tuple[int, Segment]]:
    """Return `(start, segment)` of the segments that change something; the header is often the same."""
    there = InputFile(path)
    pairs = zip(file.starts, file.segments, strict=False)
    return [(start, segment) for start, segment in pairs if segment.length and not _is_on_disk(segment, there, start)]


def _is_on_disk(segment: Segment, file: InputFile, start: int) -> bool:
    """Return whether these are bytes that the file has at `start` already."""
    if not isinstance(segment, BytesSegment | CopySegment) or segment.origin is segment:
        return segment.origin is segment
    parts = ((start + at, data) for at, data in chunks(segment))
    return all(file.read(at, at + len(data)) == data for at, data in parts)


def _merge_ranges(ranges: np.ndarray) -> np.ndarray:
    if not len(ranges):
        return ranges
    ends = ranges.sum(axis=1)
    breaks = np.flatnonzero(ends[:-1] != ranges[1:, 0]) + 1
    first = np.concatenate(([0], breaks))
    last = np.concatenate((breaks - 1, [len(ranges) - 1]))
    return np.stack((ranges[first, 0], ends[last] - ranges[first, 0]), axis=1)
