"""Putting a base back from its undo journal."""

import errno
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.io.digest import sha256_file
from pema_adapters.merging.in_place.undo_data import digest_ranges, sample_outside, save_copy, split_ranges
from pema_adapters.merging.in_place.undo_journal import (
    DONE,
    JOURNAL_DIR,
    PARTIAL_DIR,
    PATCHING,
    Journal,
    damaged_error,
    discard,
    read_journal,
    read_ranges,
    write_journal,
)
from pema_adapters.merging.output.file_patcher import open_patcher
from pema_adapters.merging.output.writer import sync_folder
from pema_adapters.merging.plan.segments import CHUNK


@dataclass(frozen=True)
class Rollback:
    """A journal that fits its base, and `{file: [begin, length] of its patched ranges}`."""

    journal: Journal
    ranges: dict[str, np.ndarray]


def plan_rollback(base: Path) -> Rollback:
    """Read the journal of a base and compare the base with it; nothing is changed.

    Raises:
        MergeError: the journal is damaged, or a file is not what the merge left: somebody changed it since, and a
            roll-back would lose the change.
    """
    journal = read_journal(base)
    _check_journal(base, journal)
    ranges = read_ranges(base, journal)
    _check_sizes(base, journal)
    _check_samples(base, journal, ranges)
    _check_written(base, journal, ranges)
    _check_whole(base, journal)
    return Rollback(journal, ranges)


def roll_back(base: Path, rollback: Rollback) -> None:
    """Restore the base and remove the journal. After a crash at any step it can be planned and done again.

    Raises:
        MergeError: somebody writes to the base at the same time.
    """
    journal, ranges = rollback.journal, rollback.ranges
    if journal.state == DONE:  # an undo that is cut off must be found unfinished
        write_journal(base / JOURNAL_DIR, replace(journal, state=PATCHING))
    _restore_names(base, journal)
    _restore_ranges(base, ranges)
    _check_samples(base, journal, ranges)  # again: nobody else wrote to the base meanwhile
    _restore_files(base, journal)
    discard(base)
    (base / JOURNAL_DIR).replace(base / PARTIAL_DIR)
    sync_folder(base)
    discard(base)


def _check_journal(base: Path, journal: Journal) -> None:
    for name, (size, expected) in journal.sums.items():
        path = base / JOURNAL_DIR / name
        if not path.is_file() or path.stat().st_size != size or sha256_file(path) != expected:
            raise damaged_error(path, f"expected {size:,} bytes of sha256 {expected[:12]}...")


def _check_sizes(base: Path, journal: Journal) -> None:
    for name, size in journal.patched.items():
        path = _current_path(base, journal, name)
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            raise _changed_error(path, f"{found} bytes, expected {size}")


def _check_written(base: Path, journal: Journal, ranges: dict[str, np.ndarray]) -> None:
    """Check that patched files hold what a complete merge wrote."""
    for name, written in journal.written.items() if journal.state == DONE else ():
        path = _current_path(base, journal, name)
        if digest_ranges(path, ranges[name]) != written:
            raise _changed_error(path, "the rows or weights that the merge wrote have changed")


def _check_samples(base: Path, journal: Journal, ranges: dict[str, np.ndarray]) -> None:
    """Check that patched files are unchanged outside of their ranges."""
    for name, expected in journal.samples.items():
        path = _current_path(base, journal, name)
        if sample_outside(path, ranges[name]) != expected:
            raise _changed_error(path, "bytes that the merge did not write have changed")


def _check_whole(base: Path, journal: Journal) -> None:
    """Check that files that the merge replaced as a whole are as it made them, as they were before, or gone."""
    for name in journal.made:
        _check_made(base, journal, name)


def _check_made(base: Path, journal: Journal, name: str) -> None:
    path, expected = base / name, [journal.made[name]]
    if name in journal.replaced:
        expected.append(journal.sums[f"saved/{journal.replaced.index(name)}"])
    elif not path.exists():
        return
    if not path.is_file() or not any(_is_content(path, one) for one in expected):
        raise _changed_error(path, "its content is not what the merge wrote")


def _is_content(path: Path, digest: list[int | str]) -> bool:
    return [path.stat().st_size, sha256_file(path)] == digest


def _current_path(base: Path, journal: Journal, name: str) -> Path:
    """Return the path of the base's file `name` now: its own, or the new one. Raises `MergeError` if both exist."""
    path = base / journal.renamed.get(name, name)
    if path == base / name or not path.exists():
        return base / name
    if (base / name).exists():
        raise _changed_error(base / name, f"there again, beside {path.name}")
    return path


def _remove_folder(path: Path) -> None:
    """Remove a folder that the merge made, unless somebody put something into it."""
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _changed_error(path: Path, how: str) -> MergeError:
    return MergeError(
        f"{path}: {how}; it was changed after the merge in place, and undoing that would lose the change; move the "
        f"file away and fetch the base again, or delete {JOURNAL_DIR} to keep everything as it is"
    )


def _restore_names(base: Path, journal: Journal) -> None:
    for name in journal.renamed:
        path = _current_path(base, journal, name)
        if path != base / name:
            path.replace(base / name)
            sync_folder(base)


def _restore_ranges(base: Path, ranges: dict[str, np.ndarray]) -> None:
    with (base / JOURNAL_DIR / "undo.bin").open("rb", buffering=CHUNK) as saved:
        for name, found in ranges.items():
            with open_patcher(base / name) as patcher:
                for begin, end in split_ranges(found):
                    patcher.write(saved.read(end - begin), begin)


def _restore_files(base: Path, journal: Journal) -> None:
    copy = base / JOURNAL_DIR / "restored"
    for number, name in enumerate(journal.replaced):
        saved = base / JOURNAL_DIR / "saved" / str(number)
        copy.unlink(missing_ok=True)
        save_copy(saved.read_bytes(), copy, like=saved)
        if name in journal.made:
            _check_made(base, journal, name)
        copy.replace(base / name)
        sync_folder((base / name).parent)
    for name in journal.created:
        if name in journal.made:
            _check_made(base, journal, name)
        (base / name).unlink(missing_ok=True)
    for name in sorted(journal.folders, key=len, reverse=True):
        _remove_folder(base / name)
    for folder in {base / parent for name in journal.created for parent in Path(name).parents}:
        if folder.is_dir():
            sync_folder(folder)
