"""Putting a base back from its undo journal."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.files import sum_of_file
from pema_adapters.merging.journal import (
    ARMED,
    DONE,
    PARTIAL,
    PATCHING,
    Journal,
    copied,
    damaged,
    discard,
    pieces,
    read_journal,
    write_journal,
)
from pema_adapters.merging.patching import patching
from pema_adapters.merging.segments import CHUNK
from pema_adapters.merging.write import sync_folder


def roll_back(base: Path) -> Journal:
    """Put the base back as it was and remove the journal. After a crash at any step, just do it again.

    Raises `MergeError` before anything is touched where the journal is damaged or a file is not the one it is about.
    """
    journal = read_journal(base)
    _check(base, journal)
    if journal.state == DONE:  # an undo that is cut off must be found unfinished
        write_journal(base / ARMED, replace(journal, state=PATCHING))
    _restore_names(base, journal)
    _restore_ranges(base, journal)
    _restore_files(base, journal)
    discard(base)
    (base / ARMED).replace(base / PARTIAL)
    sync_folder(base)
    discard(base)
    return journal


def _check(base: Path, journal: Journal) -> None:
    for name, (size, expected) in journal.sums.items():
        path = base / ARMED / name
        if not path.is_file() or path.stat().st_size != size or sum_of_file(path) != expected:
            raise damaged(path, f"expected {size:,} bytes of sha256 {expected[:12]}...")
    for name, size in journal.patched.items():
        path = _where(base, journal, name)
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            raise _changed(path, f"{found} bytes, expected {size}")


def _where(base: Path, journal: Journal, name: str) -> Path:
    """Where the base's file `name` is now: under its own name, or the other one. Raises `MergeError` if both are."""
    path = base / journal.renamed.get(name, name)
    if path == base / name or not path.exists():
        return base / name
    if (base / name).exists():
        raise _changed(base / name, f"there again, beside {path.name}")
    return path


def _changed(path: Path, how: str) -> MergeError:
    return MergeError(
        f"{path}: {how}; it was changed after the merge in place, which can no longer be undone; fetch the base "
        f"again, or delete {ARMED} in it to keep it as it is"
    )


def _restore_names(base: Path, journal: Journal) -> None:
    for name in journal.renamed:
        path = _where(base, journal, name)
        if path != base / name:
            path.replace(base / name)
            sync_folder(base)


def _restore_ranges(base: Path, journal: Journal) -> None:
    ranges = np.load(base / ARMED / "ranges.npy", allow_pickle=False)
    with (base / ARMED / "undo.bin").open("rb", buffering=CHUNK) as saved:
        for number, name in enumerate(journal.patched):
            with patching(base / name) as patcher:
                for begin, end in pieces(ranges[ranges[:, 0] == number, 1:]):
                    patcher.write(saved.read(end - begin), begin)


def _restore_files(base: Path, journal: Journal) -> None:
    copy = base / ARMED / "restored"
    for number, name in enumerate(journal.replaced):
        saved = base / ARMED / "saved" / str(number)
        copy.unlink(missing_ok=True)
        copied(saved.read_bytes(), copy, like=saved)
        copy.replace(base / name)
        sync_folder((base / name).parent)
    for name in journal.created:
        (base / name).unlink(missing_ok=True)
    for name in sorted(journal.folders, key=len, reverse=True):
        with suppress(OSError):  # not there yet, or somebody put something into it
            (base / name).rmdir()
    for folder in {base / parent for name in journal.created for parent in Path(name).parents}:
        if folder.is_dir():
            sync_folder(folder)
