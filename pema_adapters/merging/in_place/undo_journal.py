"""The undo journal of a merge in place: what the base held before, so that it can hold it again.

`BASE/.pema-undo` is built under another name and renamed when it is complete: from then on it is committed, and whoever
finds it unfinished puts the base back. It holds `journal.json`, `undo.bin` (the bytes of every range that is written
over, in order), `ranges.npy` (int64 [n, 3]: number of the file, offset, length), `saved/N` (small files that are
replaced) and `new/N` (what is to be put in place, already on disk).
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.formats.json_object import MAX_JSON
from pema_adapters.merging.in_place.change_set import ChangeSet, is_safe
from pema_adapters.merging.in_place.undo_data import (
    Digest,
    copy_mode,
    encode_ranges,
    read_originals,
    sample_outside,
    save_copy,
    write_copy,
)
from pema_adapters.merging.output.writer import sync_folder

JOURNAL_DIR = ".pema-undo"
PARTIAL_DIR = ".pema-undo.partial"
VERSION = 2
"""2 has `made`, `written` and `samples`; a journal of version 1 can be undone without them."""
PATCHING, DONE = "patching", "done"


@dataclass(frozen=True)
class Journal:
    """`journal.json`. `sums`: digest of every other file that a roll-back reads.

    patched: sizes, by the names that the base has. renamed: `{that name: the one after the merge}`.
    made: digests of the files that the merge put in place whole. written: sha256 of what the merge wrote into the
    ranges of each patched file; empty while it has not ended. samples: sha256 of blocks outside of the ranges.
    """

    state: str
    patched: dict[str, int]
    replaced: list[str]
    created: list[str]
    folders: list[str]
    sums: dict[str, Digest]
    report: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    made: dict[str, Digest] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)


def commit_journal(base: Path, changes: ChangeSet, report: dict[str, Any]) -> Journal:
    """Save what will change and what will take its place, all of it on disk before this returns."""
    folder = base / PARTIAL_DIR
    folder.mkdir(mode=0o700)  # it holds copies of files that others may not be allowed to read
    parts = [folder / part for part, files in (("saved", changes.replaced), ("new", changes.new)) if files]
    for part in parts:
        part.mkdir()
    sums = {"undo.bin": write_copy(read_originals(base, changes), folder / "undo.bin")}
    sums["ranges.npy"] = save_copy(encode_ranges(changes), folder / "ranges.npy")
    for number, file in enumerate(changes.replaced):
        data = (base / file.name).read_bytes()
        sums[f"saved/{number}"] = save_copy(data, folder / "saved" / str(number), like=base / file.name)
    made = {}
    for number, file in enumerate(changes.new):
        made[file.name] = save_copy(file, folder / "new" / str(number))
        copy_mode(folder / "new" / str(number), base, file.name)
    for part in parts:
        sync_folder(part)
    journal = _journal(base, changes, sums, report, made)
    write_journal(folder, journal)
    folder.replace(base / JOURNAL_DIR)
    sync_folder(base)
    return journal


def _journal(
    base: Path, changes: ChangeSet, sums: dict[str, Digest], report: dict[str, Any], made: dict[str, Digest]
) -> Journal:
    sizes = {name: (base / name).stat().st_size for name in changes.patched}
    replaced, created = ([file.name for file in files] for files in (changes.replaced, changes.created))
    samples = {name: sample_outside(base / name, ranges) for name, ranges in changes.patched.items()}
    folders = _new_folders(base, created)
    return Journal(
        PATCHING, sizes, replaced, created, folders, sums, report, changes.renamed, made=made, samples=samples
    )


def mark_done(base: Path, journal: Journal, report: dict[str, Any], written: dict[str, str]) -> None:
    """Say that the merge is complete: from here on only `undo` takes it back."""
    write_journal(base / JOURNAL_DIR, replace(journal, state=DONE, report=report, written=written))


def read_state(base: Path) -> str | None:
    """Return PATCHING, DONE, or None without a journal. Raises `MergeError` if it is damaged."""
    return read_journal(base).state if (base / JOURNAL_DIR).is_dir() else None


def read_journal(base: Path) -> Journal:
    """Read `journal.json`. Raises `MergeError` if it is not what was written."""
    path = base / JOURNAL_DIR / "journal.json"
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_bytes())
        if type(content["version"]) is int and content["version"] > VERSION:
            raise MergeError(
                f"{path}: written by a newer version of pema_adapters (format {content['version']}, this one reads up "
                f"to {VERSION}); upgrade pema-adapters to undo the merge"
            )
        found = content["journal"]
        if content["sha256"] != _sum(found):
            raise ValueError("its checksum differs")
        known = {one.name for one in fields(Journal)}
        journal = _validate(Journal(**{key: value for key, value in found.items() if key in known}))
        names = (*journal.patched, *journal.replaced, *journal.created, *journal.folders)
        names = (*names, *journal.renamed, *journal.renamed.values())
        bad = [name for name in names if not is_safe(base, name)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged_error(path, str(error)) from None
    if bad:
        raise damaged_error(path, f"{bad[0]!r} is a link or lies outside of the base")
    return journal


def _validate(journal: Journal) -> Journal:
    """Check the type of every field: a base may come with a journal from anybody. Raises ValueError."""
    names = (*journal.replaced, *journal.created, *journal.folders)
    expected_sums = {"undo.bin", "ranges.npy", *(f"saved/{number}" for number in range(len(journal.replaced)))}
    checks = {
        "state": journal.state in (PATCHING, DONE),
        "patched": all(_is_size(size) for size in journal.patched.values()),
        "lists": all(isinstance(found, list) for found in (journal.replaced, journal.created, journal.folders)),
        "names": all(isinstance(name, str) for name in (*names, *journal.renamed.values())),
        "sums": journal.sums.keys() == expected_sums and all(map(_is_digest, journal.sums.values())),
        "made": all(map(_is_digest, journal.made.values())),
        "renamed": journal.renamed.keys() <= journal.patched.keys(),
        "digests": all(map(_is_sha256, (*journal.written.values(), *journal.samples.values()))),
        "report": isinstance(journal.report, dict),
    }
    for name, is_right in checks.items():
        if not is_right:
            raise ValueError(f"its {name} are not what a merge writes")
    return journal


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_digest(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_size(value[0]) and _is_sha256(value[1])


def read_ranges(base: Path, journal: Journal) -> dict[str, np.ndarray]:
    """Read the ranges that the merge writes, int64 [n, 2] of (offset, length), by the patched file's name.

    Raises `MergeError` where they are not within the files, or are not what undo.bin holds.
    """
    path = base / JOURNAL_DIR / "ranges.npy"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.dtype != np.int64 or found.ndim != 2 or found.shape[1] != 3:
            raise ValueError(f"{found.dtype} {list(found.shape)}, expected int64 [n, 3]")
        ranges = {name: np.array(found[found[:, 0] == k, 1:]) for k, name in enumerate(journal.patched)}
        if sum(map(len, ranges.values())) != len(found):
            raise ValueError("ranges of files that it does not name")
        total = sum(_count_bytes(part, journal.patched[name]) for name, part in ranges.items())
        if total != journal.sums["undo.bin"][0]:
            raise ValueError(f"{total:,} bytes of ranges, but undo.bin has {journal.sums['undo.bin'][0]:,}")
    except (OSError, ValueError, EOFError) as error:
        raise damaged_error(path, str(error)) from None
    return ranges


def _count_bytes(ranges: np.ndarray, size: int) -> int:
    """Count the bytes of the ranges of a file of `size` bytes. Raises ValueError unless they are sorted and inside."""
    offsets, lengths = ranges[:, 0], ranges[:, 1]
    if not ((offsets >= 0) & (lengths > 0) & (lengths <= size) & (offsets <= size - lengths)).all():
        raise ValueError(f"a range is not within the {size:,} bytes of its file")
    if not (offsets[1:] >= ranges.sum(axis=1)[:-1]).all():
        raise ValueError("its ranges overlap")
    return int(lengths.sum())


def discard(base: Path) -> None:
    """Remove a journal that was never committed, or is not any more. Raises `MergeError` where the system refuses."""
    try:
        if (base / PARTIAL_DIR).exists():
            shutil.rmtree(base / PARTIAL_DIR)
    except OSError as error:
        raise MergeError(
            f"{base}: the base is as it was, but what is left of the undo journal cannot be removed "
            f"({error.strerror or error}); delete {PARTIAL_DIR} in it"
        ) from error


def damaged_error(path: Path, why: str) -> MergeError:
    """Return the error of a journal that cannot be followed."""
    return MergeError(
        f"{path}: the undo journal is damaged ({why}) and was not followed; fetch the base again, or delete "
        f"{JOURNAL_DIR} in it to keep it as it is"
    )


def write_journal(folder: Path, journal: Journal) -> None:
    """Replace journal.json in one step."""
    content = {"version": VERSION, "sha256": _sum(vars(journal)), "journal": vars(journal)}
    fresh = folder / "journal.json.new"
    fresh.unlink(missing_ok=True)
    save_copy(_encode(content), fresh)
    fresh.replace(folder / "journal.json")
    sync_folder(folder)


def _new_folders(base: Path, created: list[str]) -> list[str]:
    parents = {parent.as_posix() for name in created for parent in PurePosixPath(name).parents if parent.name}
    return sorted(parent for parent in parents if not (base / parent).exists())


def _encode(content: Any) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _sum(content: Any) -> str:
    return hashlib.sha256(_encode(content)).hexdigest()
