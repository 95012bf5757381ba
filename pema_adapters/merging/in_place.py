"""A merge in place: the files of the base are patched, with a journal that can put every byte back.

Nothing is changed before the journal is complete and on disk. A crash leaves the base untouched, complete, or with an
armed journal that `roll_back_interrupted` follows.
"""

import os
from bisect import bisect_right
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.merging import journal
from pema_adapters.merging.journal import ARMED, DONE, PARTIAL, PATCHING, Todo, is_safe
from pema_adapters.merging.plan import Plan, PlannedFile
from pema_adapters.merging.progress import Advance
from pema_adapters.merging.segments import Copy, Literal, Rows, Segment, chunks
from pema_adapters.merging.target import check_space
from pema_adapters.merging.write import sync_folder

WEIGHTS = ".safetensors"
MOST_REPLACED = 64 << 20
_INSTEAD = "write a new checkpoint with --output"


def merge_in_place(plan: Plan, base: Path, report: dict[str, Any], verify: bool, advance: Advance) -> int:
    """Make `base`, the folder that `plan` was made from, hold what the plan says. Returns the bytes written into it.

    `report` is kept in the journal, with `bytes_written` and `max_rounding_error` as they turn out. `advance` hears of
    `plan.size` bytes, and with `verify`, which compares with the plan what is read back, of as many again.

    Raises `MergeError` (refused before anything is written, or verification failed) or whatever went wrong; then the
    base is as it was.
    """
    check_in_place(base)
    with journal.locked(base):
        check_in_place(base)  # again: another merge may have ended meanwhile
        todo = _sort(plan, base)
        check_space(base / ARMED, todo.journal_size)
        expected = {file.name: _sum(file) for file in plan.files if verify and todo.touches(file.name)}
        journal.discard(base)
        try:
            armed = journal.arm(base, todo, report)
            written = _apply(plan, todo, base, advance)
            if verify:
                _verify(plan, base, expected, advance)
            outcome = {"bytes_written": written, "max_rounding_error": plan.rounding.largest}
            journal.finish(base, armed, {**report, **outcome})
        except BaseException as error:
            _abandon(base, error)
            raise
    return written


def check_in_place(base: Path) -> None:
    """Refuse a base that cannot be merged in place, whatever the delta. Raises `MergeError`."""
    if not base.is_dir():
        raise MergeError(f"{base}: no such folder; --in-place needs the base as a folder of its own")
    state = journal.state_of(base)
    if state == DONE:
        raise MergeError(f"{base}: already merged in place (it holds {ARMED}); undo it first with --undo")
    if state == PATCHING:
        raise MergeError(f"{base}: a merge in place was cut off here; put the base back first with --undo")
    if not os.access(base, os.W_OK | os.X_OK):
        raise MergeError(f"{base}: not writable, so it cannot be merged in place; {_INSTEAD}")


def roll_back_interrupted(base: Path) -> bool:
    """Put a base back whose merge in place, or whose undo, was cut off. Returns whether there was one.

    To be called before the base is read. Raises `MergeError` where one is running, or the journal is damaged.
    """
    if not any((base / name).is_dir() for name in (ARMED, PARTIAL)):
        return False
    if journal.state_of(base) == DONE and not (base / PARTIAL).is_dir():
        return False
    with journal.locked(base):
        journal.discard(base)
        if journal.state_of(base) != PATCHING:
            return False
        journal.roll_back(base)
    return True


def undo(base: Path) -> dict[str, Any]:
    """Put the base back, byte for byte, as it was before the merge in place. Returns the report of that merge.

    Raises `MergeError` where there is nothing to undo, or where the journal or a file is not what was written.
    """
    if not (base / ARMED).is_dir():
        raise MergeError(f"{base}: nothing to undo (it holds no {ARMED}); it was not merged in place, or is undone")
    with journal.locked(base):
        return journal.roll_back(base).report


def _sort(plan: Plan, base: Path) -> Todo:
    """Decide for every file of the plan. Raises `MergeError`."""
    patched: dict[str, np.ndarray] = {}
    replaced, created = [], []
    for file in plan.files:
        path = base / file.name
        if not path.exists() and not path.is_symlink():
            _check_created(file, base)
            created.append(file)
        elif file.name.endswith(WEIGHTS) and path.is_file() and _can_be_patched(file, path):
            ranges = _ranges(file, path)
            if len(ranges):
                _check_own(file, base)
                patched[file.name] = ranges
        elif not _holds(file, path):
            _check_replaceable(file, path)
            _check_own(file, base)
            replaced.append(file)
    return Todo(patched, tuple(replaced), tuple(created))


def _can_be_patched(file: PlannedFile, path: Path) -> bool:
    return file.patches(path) and not any(_is_remade(segment) for segment in file.segments)


def _is_remade(segment: Segment) -> bool:
    """Whether bytes that are not counted as changes are made of others of the base, in another dtype, say."""
    if isinstance(segment, Rows):
        return not isinstance(segment.base, Copy)
    return segment.origin is None and _reads_origin(segment) is not None


def _reads_origin(segment: Segment) -> Copy | None:
    """The file that a segment is made from in the end, if any."""
    while segment.origin is None:
        below = getattr(segment, "base", None) or getattr(segment, "source", None)
        if below is None:
            return None
        segment = below
    return segment.origin


def _check_created(file: PlannedFile, base: Path) -> None:
    """New files may not hold weights of the base: these would have moved, and lie there twice."""
    if not is_safe(base, file.name):
        raise MergeError(f"{base / file.name}: would lie outside of the base, or behind a link; {_INSTEAD}")
    if file.name.endswith(WEIGHTS):
        for origin in filter(None, map(_reads_origin, file.segments)):
            if base in origin.path.parents:
                raise _moved(base / file.name, f"they are in {origin.path.name}")


def _check_replaceable(file: PlannedFile, path: Path) -> None:
    if not path.is_file():
        raise MergeError(f"{path}: not a file, but the merge writes one of that name; {_INSTEAD}")
    size = path.stat().st_size
    if file.name.endswith(WEIGHTS):
        raise _moved(path, f"{size} bytes -> {file.size} bytes" if size != file.size else "or change their dtype")
    if max(size, file.size) >= MOST_REPLACED:
        raise MergeError(f"{path}: {max(size, file.size)} bytes are too many to be replaced in place; {_INSTEAD}")


def _moved(path: Path, how: str) -> MergeError:
    return MergeError(f"{path}: cannot be merged in place: its tensors would move ({how}); {_INSTEAD}")


def _check_own(file: PlannedFile, base: Path) -> None:
    """Refuse a file that others see change too, or that cannot be written."""
    path = base / file.name
    if not is_safe(base, file.name):
        raise MergeError(
            f"{path}: is a link, to the Hub's cache for example, and others would change with it; "
            f"copy the folder first, or {_INSTEAD}"
        )
    links = path.stat().st_nlink
    if links > 1:
        raise MergeError(
            f"{path}: has {links} names (hard links), and the others would change with it; "
            f"copy the folder first, or {_INSTEAD}"
        )
    if not os.access(path, os.W_OK):
        raise MergeError(f"{path}: not writable, so it cannot be merged in place; {_INSTEAD}")


def _holds(file: PlannedFile, path: Path) -> bool:
    """Whether the file is what it is planned to be."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if all(isinstance(segment, Copy) for segment in file.segments) and file.patches(path):
        return True
    return all(Copy(path, begin, len(data)).read(0, len(data)) == data for begin, data in file.chunks())


def _ranges(file: PlannedFile, path: Path) -> np.ndarray:
    """Where the file changes: int64 [n, 2] of (offset, length), neighbours joined."""
    found = [np.empty((0, 2), np.int64)]
    for start, segment in _changing(file, path):
        if isinstance(segment, Rows):  # rather than `changes`, which would compute what is cast
            ids = np.asarray(segment.token_ids, np.int64)
            found.append(np.stack((start + ids * segment.row_bytes, np.full(len(ids), segment.row_bytes)), axis=1))
        else:
            found.append(np.array([[start, segment.length]], np.int64))
    return _joined(np.concatenate(found))


def _changing(file: PlannedFile, path: Path) -> list[tuple[int, Segment]]:
    """`(start, segment)` of those that change something; the header is often the same."""
    pairs = zip(file.starts, file.segments, strict=False)
    return [(start, segment) for start, segment in pairs if segment.length and not _is_there(segment, path, start)]


def _is_there(segment: Segment, path: Path, start: int) -> bool:
    if not isinstance(segment, Literal):
        return isinstance(segment, Copy)
    return all(Copy(path, start + at, len(data)).read(0, len(data)) == data for at, data in chunks(segment))


def _joined(ranges: np.ndarray) -> np.ndarray:
    if not len(ranges):
        return ranges
    ends = ranges.sum(axis=1)
    breaks = np.flatnonzero(ends[:-1] != ranges[1:, 0]) + 1
    first = np.concatenate(([0], breaks))
    last = np.concatenate((breaks - 1, [len(ranges) - 1]))
    return np.stack((ranges[first, 0], ends[last] - ranges[first, 0]), axis=1)


def _apply(plan: Plan, todo: Todo, base: Path, advance: Advance) -> int:
    """Patch, and put new files in place, all on disk. Returns the bytes written."""
    written = 0
    for file in plan.files:
        if file.name in todo.patched:
            written += _patch(file, base / file.name, todo.patched[file.name])
        advance(file.size)
    for number, file in enumerate(todo.new):
        path = base / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        (base / ARMED / "new" / str(number)).replace(path)
        written += file.size
    parents = {base / parent for file in todo.new for parent in Path(file.name).parents}
    for folder in sorted(parents):
        sync_folder(folder)
    return written


def _patch(file: PlannedFile, path: Path, ranges: np.ndarray) -> int:
    """Write the changes over the base, each as soon as it is computed: it depends on no other byte of the base."""
    begins, ends, written = ranges[:, 0].tolist(), ranges.sum(axis=1).tolist(), 0
    changing = _changing(file, path)
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        for start, segment in changing:
            for offset, data in segment.changes():
                at = start + offset
                k = bisect_right(begins, at) - 1
                if k < 0 or at + len(data) > ends[k]:
                    raise MergeError(f"{path}: bytes {at} to {at + len(data)} are not in the undo journal")
                journal.write_all(fd, data, at)
                written += len(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    return written


def _sum(file: PlannedFile) -> str:
    digest = sha256()
    for _, data in file.chunks():
        digest.update(data)
    return digest.hexdigest()


def _verify(plan: Plan, base: Path, expected: dict[str, str], advance: Advance) -> None:
    """Compare what is on disk with the sums taken before, when the plan could still be read. Raises `MergeError`."""
    for file in plan.files:
        path = base / file.name
        if file.name in expected:
            with path.open("rb") as written:
                if hasattr(os, "posix_fadvise"):  # from the disk rather than from the page cache
                    os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if _sum(PlannedFile(file.name, (Copy(path, 0, path.stat().st_size),))) != expected[file.name]:
                raise MergeError(f"{path}: is not what base and delta make; the disk lost a write, and it was put back")
        advance(file.size)


def _abandon(base: Path, error: BaseException) -> None:
    """Leave the base as it was. Raises `MergeError` where that fails too; the journal stays then."""
    try:
        if (base / ARMED).is_dir():
            journal.roll_back(base)
        else:
            journal.discard(base)
    except (OSError, MergeError) as other:
        raise MergeError(
            f"{base}: the merge failed ({error}), and putting the base back failed too ({other}); {ARMED} holds what "
            "it takes: run again, or with --undo"
        ) from error
