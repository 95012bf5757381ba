"""Merging into the base's own files, with a journal that can restore every byte.

Nothing is changed before the journal is complete and on disk. A crash leaves the base untouched, complete, or with a
journal that `roll_back_interrupted` follows.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import InputChangedError, MergeError, PemaError
from pema_adapters.io.digest import BackgroundSha256, sha256_file
from pema_adapters.io.input_file import InputFile, check_unchanged
from pema_adapters.io.interrupts import defer_interrupts
from pema_adapters.io.locking import BUSY, hold_lock
from pema_adapters.io.progress import Advance
from pema_adapters.merging.in_place import undo_journal
from pema_adapters.merging.in_place.change_set import ChangeSet, find_changed_segments, plan_changes
from pema_adapters.merging.in_place.rollback import plan_rollback, roll_back
from pema_adapters.merging.in_place.undo_data import sample_outside
from pema_adapters.merging.in_place.undo_journal import DONE, JOURNAL_DIR, PARTIAL_DIR, PATCHING
from pema_adapters.merging.output.file_patcher import open_patcher
from pema_adapters.merging.output.free_space import check_free
from pema_adapters.merging.output.writer import sync_folder
from pema_adapters.merging.plan.plan import WRITE_ANEW, Plan, PlannedFile


@dataclass(frozen=True)
class InPlaceMerge:
    """A merge in place: `base` is the folder that `plan` was made from, `files` all that it was made from.

    report: kept in the journal, with `bytes_written` and `max_rounding_error` as they turn out.
    """

    plan: Plan
    base: Path
    files: tuple[InputFile, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)


def merge_in_place(work: InPlaceMerge, verify: bool, advance: Advance) -> int:
    """Make the base hold what the plan says. Returns the bytes written into it.

    `advance` is called with `plan.size` bytes in all, and with `verify`, which compares with the plan what is read
    back, with as many again. The caller holds the exclusive lock on the base.

    Raises `MergeError` (refused before anything is written, or verification failed) or whatever went wrong; then the
    base is as it was.
    """
    plan, base = work.plan, work.base
    check_in_place(base)
    changes = plan_changes(plan, base)
    check_free(base, changes.journal_size)
    expected = {file.name: _sha256_of_changes(file) for file in plan.files if verify and changes.touches(file.name)}
    undo_journal.discard(base)
    is_done, journal = False, None
    try:
        journal = undo_journal.commit_journal(base, changes, work.report)
        check_unchanged(work.files)
        written, digests = _apply_changes(work, changes, advance)
        if verify:
            _verify(plan, base, expected, advance)
        check_unchanged(_not_written(work.files, changes, base))
        _check_outside_ranges(changes, base, journal)
        outcome = {"bytes_written": written, "max_rounding_error": plan.rounding.largest}
        with defer_interrupts():
            undo_journal.mark_done(base, journal, {**work.report, **outcome}, digests)
            is_done = True
    except BaseException as error:
        if is_done:
            raise _error_after_commit(base, error) from None
        _rollback_on_error(base, error, is_committed=journal is not None)
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(f"{base} is as it was") from None
        if isinstance(error, OSError):
            raise MergeError(f"{error.filename or base}: {error.strerror or error}; {base} is as it was") from error
        raise
    return written


def _not_written(files: Iterable[InputFile], changes: ChangeSet, base: Path) -> list[InputFile]:
    """Return the input files that the merge itself does not write."""
    own = {base / name for name in (*changes.patched, *changes.renamed, *(file.name for file in changes.new))}
    return [file for file in files if file.path not in own]


def _check_outside_ranges(changes: ChangeSet, base: Path, journal: undo_journal.Journal) -> None:
    """Raise `InputChangedError` if somebody else wrote to a file while it was patched."""
    for name, ranges in changes.patched.items():
        path = base / changes.renamed.get(name, name)
        if sample_outside(path, ranges) != journal.samples[name]:
            raise InputChangedError(f"{path}: changed while it was in use: somebody else wrote to it during the merge")


def _error_after_commit(base: Path, error: BaseException) -> BaseException:
    text = f"{base} is merged completely"
    return type(error)(text) if isinstance(error, KeyboardInterrupt) else MergeError(f"{text}, but then: {error}")


def check_in_place(base: Path) -> None:
    """Refuse a base that cannot be merged in place, whatever the delta. Raises `MergeError`."""
    if not base.is_dir():
        raise MergeError(f"{base}: no such folder; --in-place needs the base as a folder of its own")
    state = undo_journal.read_state(base)
    if state == DONE:
        raise MergeError(f"{base}: already merged in place (it holds {JOURNAL_DIR}); undo it first with --undo")
    if state == PATCHING:
        raise MergeError(f"{base}: a merge in place was cut off here; put the base back first with --undo")
    if not os.access(base, os.W_OK | os.X_OK):
        raise MergeError(f"{base}: not writable, so it cannot be merged in place; {WRITE_ANEW}")


def roll_back_interrupted(base: Path) -> bool:
    """Put a base back whose merge in place, or whose undo, was cut off. Returns whether there was one.

    To be called before the base is read, by who holds the exclusive lock on it. Raises `MergeError` where the journal
    is damaged.
    """
    if not any((base / name).is_dir() for name in (JOURNAL_DIR, PARTIAL_DIR)):
        return False
    if undo_journal.read_state(base) == DONE and not (base / PARTIAL_DIR).is_dir():
        return False
    undo_journal.discard(base)
    if undo_journal.read_state(base) != PATCHING:
        return False
    _restore(base)
    return True


def _restore(base: Path) -> dict[str, Any]:
    """Roll back, and say how far that got where it is stopped. Returns the report of the merge."""
    try:
        rollback = plan_rollback(base)
        try:
            roll_back(base, rollback)
        except PemaError as error:
            raise MergeError(f"{error}; {_describe_progress(base)}") from error
        return rollback.journal.report
    except OSError as error:
        raise MergeError(f"{error.filename or base}: {error.strerror or error}; {_describe_progress(base)}") from error
    except KeyboardInterrupt as error:
        raise type(error)(_describe_progress(base)) from None


def _describe_progress(base: Path) -> str:
    """Say in which state a stopped roll-back left the base."""
    try:
        if not (base / JOURNAL_DIR).is_dir():
            leftover = (base / PARTIAL_DIR).exists()
            rest = f"; what is left of the undo journal, {PARTIAL_DIR} in it, may go" if leftover else ""
            return f"{base} is restored{rest}"
    except OSError:
        return f"{base} cannot be read any more: run --undo again when it can"
    try:
        if undo_journal.read_state(base) == DONE:
            return f"{base} is still merged, nothing was undone"
    except (OSError, PemaError):
        pass
    return f"{base} is restored in part, its undo journal is intact: run --undo again"


def undo(base: Path) -> dict[str, Any]:
    """Put the base back, byte for byte, as it was before the merge in place. Returns the report of that merge.

    Raises `MergeError` where there is nothing to undo, or where the journal or a file is not what was written.
    """
    if not base.is_dir():
        raise MergeError(f"{base}: no such folder; expected a base that was merged in place")
    with hold_lock(base, True, BUSY):
        if not (base / JOURNAL_DIR).is_dir():
            undo_journal.discard(base)  # of an undo that was cut off at its very end
            raise MergeError(
                f"{base}: nothing to undo (it holds no {JOURNAL_DIR}); it was not merged in place, or is undone"
            )
        return _restore(base)


def _apply_changes(work: InPlaceMerge, changes: ChangeSet, advance: Advance) -> tuple[int, dict[str, str]]:
    """Patch, rename, and put new files in place, all on disk.

    Returns the bytes written, and the sha256 of what every patched file holds in its ranges now.
    """
    plan, base = work.plan, work.base
    written, digests = 0, {}
    for file in plan.files:
        name = changes.name_in_base(file.name)
        if name in changes.patched:
            count, digests[name] = _patch(file, base / name, changes.patched[name])
            written += count
        advance(file.size)
    for old, name in changes.renamed.items():
        (base / old).replace(base / name)
    for number, file in enumerate(changes.new):
        path = base / file.name
        for folder in reversed(Path(file.name).parents[:-1]):  # none of `base` itself, which somebody may have removed
            (base / folder).mkdir(exist_ok=True)
        check_unchanged(found for found in work.files if found.path == path)
        (base / JOURNAL_DIR / "new" / str(number)).replace(path)
        written += file.size
    names = (*changes.renamed.values(), *(file.name for file in changes.new))
    for folder in sorted({base / parent for name in names for parent in Path(name).parents}):
        sync_folder(folder)
    return written, digests


def _patch(file: PlannedFile, path: Path, ranges: np.ndarray) -> tuple[int, str]:
    """Write the changes over the base, each as soon as it is computed: it depends on no other byte of the base."""
    begins, ends = ranges[:, 0].tolist(), ranges.sum(axis=1).tolist()
    changes = find_changed_segments(file, path)
    with open_patcher(path) as patcher, BackgroundSha256() as digest:
        for start, segment in changes:
            for offset, data in segment.changes():
                at = start + offset
                k = bisect_right(begins, at) - 1
                if k < 0 or at + len(data) > ends[k]:
                    raise MergeError(f"{path}: bytes {at} to {at + len(data)} are not in the undo journal")
                digest.update(data)
                patcher.write(data, at)
        return patcher.written, digest.hexdigest()


def _sha256_of_changes(file: PlannedFile) -> str:
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
            if sha256_file(path) != expected[file.name]:
                raise MergeError(f"{path}: is not what base and delta make; the disk lost a write, and it was put back")
        advance(file.size)


def _rollback_on_error(base: Path, error: BaseException, is_committed: bool) -> None:
    """Leave the base as it was. Raises `MergeError` where that fails too; the journal stays then.

    is_committed: whether the journal was written, so that the base may have been changed.
    """
    try:
        with defer_interrupts():
            if (base / JOURNAL_DIR).is_dir():
                roll_back(base, plan_rollback(base))
            elif is_committed:
                raise MergeError("somebody removed the undo journal: fetch the base again")
            else:
                undo_journal.discard(base)
    except (OSError, PemaError) as other:
        rest = f"; the journal {JOURNAL_DIR} is intact: run --undo" if (base / JOURNAL_DIR).is_dir() else ""
        raise MergeError(f"{base}: the merge failed ({error}), and the roll-back failed too ({other}){rest}") from error
