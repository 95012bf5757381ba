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
from pema_adapters.files import sum_of_file
from pema_adapters.merging import journal
from pema_adapters.merging.journal import ARMED, DONE, PARTIAL, PATCHING
from pema_adapters.merging.patching import patching
from pema_adapters.merging.plan import Plan, PlannedFile
from pema_adapters.merging.progress import Advance
from pema_adapters.merging.rollback import roll_back
from pema_adapters.merging.target import check_space
from pema_adapters.merging.todo import INSTEAD, Todo, changing, todo_of
from pema_adapters.merging.write import sync_folder


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
        todo = todo_of(plan, base)
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
        raise MergeError(f"{base}: not writable, so it cannot be merged in place; {INSTEAD}")


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
        roll_back(base)
    return True


def undo(base: Path) -> dict[str, Any]:
    """Put the base back, byte for byte, as it was before the merge in place. Returns the report of that merge.

    Raises `MergeError` where there is nothing to undo, or where the journal or a file is not what was written.
    """
    if not (base / ARMED).is_dir():
        raise MergeError(f"{base}: nothing to undo (it holds no {ARMED}); it was not merged in place, or is undone")
    with journal.locked(base):
        return roll_back(base).report


def _apply(plan: Plan, todo: Todo, base: Path, advance: Advance) -> int:
    """Patch, rename, and put new files in place, all on disk. Returns the bytes written."""
    written = 0
    for file in plan.files:
        name = todo.name_in_base(file.name)
        if name in todo.patched:
            written += _patch(file, base / name, todo.patched[name])
        advance(file.size)
    for old, name in todo.renamed.items():
        (base / old).replace(base / name)
    for number, file in enumerate(todo.new):
        path = base / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        (base / ARMED / "new" / str(number)).replace(path)
        written += file.size
    names = (*todo.renamed.values(), *(file.name for file in todo.new))
    for folder in sorted({base / parent for name in names for parent in Path(name).parents}):
        sync_folder(folder)
    return written


def _patch(file: PlannedFile, path: Path, ranges: np.ndarray) -> int:
    """Write the changes over the base, each as soon as it is computed: it depends on no other byte of the base."""
    begins, ends = ranges[:, 0].tolist(), ranges.sum(axis=1).tolist()
    changes = changing(file, path)
    if not changes:
        return 0
    with patching(path) as patcher:
        for start, segment in changes:
            for offset, data in segment.changes():
                at = start + offset
                k = bisect_right(begins, at) - 1
                if k < 0 or at + len(data) > ends[k]:
                    raise MergeError(f"{path}: bytes {at} to {at + len(data)} are not in the undo journal")
                patcher.write(data, at)
    return patcher.written


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
            if sum_of_file(path) != expected[file.name]:
                raise MergeError(f"{path}: is not what base and delta make; the disk lost a write, and it was put back")
        advance(file.size)


def _abandon(base: Path, error: BaseException) -> None:
    """Leave the base as it was. Raises `MergeError` where that fails too; the journal stays then."""
    try:
        if (base / ARMED).is_dir():
            roll_back(base)
        else:
            journal.discard(base)
    except (OSError, MergeError) as other:
        raise MergeError(
            f"{base}: the merge failed ({error}), and putting the base back failed too ({other}); {ARMED} holds what "
            "it takes: run again, or with --undo"
        ) from error
