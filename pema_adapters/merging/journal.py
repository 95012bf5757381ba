"""The undo journal of a merge in place: what the base held before, so that it can hold it again.

`BASE/.pema-undo` is built under another name and renamed when it is complete: from then on it is armed, and whoever
finds it unfinished puts the base back. It holds `journal.json`, `undo.bin` (the bytes of every range that is written
over, in order), `ranges.npy` (int64 [n, 3]: number of the file, offset, length), `saved/N` (small files that are
replaced) and `new/N` (what is to be put in place, already on disk).
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.merging.plan import PlannedFile
from pema_adapters.merging.segments import CHUNK
from pema_adapters.merging.todo import Todo, is_safe
from pema_adapters.merging.write import sync_folder

ARMED = ".pema-undo"
PARTIAL = ".pema-undo.partial"
VERSION = 1
PATCHING, DONE = "patching", "done"


@dataclass(frozen=True)
class Journal:
    """`journal.json`. `sums`: size and sha256 of every other file that a rollback reads.

    patched: sizes, by the names that the base has. renamed: `{that name: the one after the merge}`.
    """

    state: str
    patched: dict[str, int]
    replaced: list[str]
    created: list[str]
    folders: list[str]
    sums: dict[str, list[Any]]
    report: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


@contextmanager
def locked(base: Path) -> Iterator[None]:
    """Keep other merges in place and rollbacks out. Raises `MergeError` where one is running."""
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MergeError(f"{base}: another merge in place is running here; wait for it to end") from None
        yield
    finally:
        os.close(fd)


def arm(base: Path, todo: Todo, report: dict[str, Any]) -> Journal:
    """Save what will change and what will take its place, all of it on disk before this returns."""
    folder = base / PARTIAL
    parts = [folder / part for part, files in (("saved", todo.replaced), ("new", todo.new)) if files]
    for part in (folder, *parts):
        part.mkdir()
    sums = {"undo.bin": _saved(_originals(base, todo), folder / "undo.bin")}
    sums["ranges.npy"] = copied(_numbered(todo), folder / "ranges.npy")
    for number, file in enumerate(todo.replaced):
        data = (base / file.name).read_bytes()
        sums[f"saved/{number}"] = copied(data, folder / "saved" / str(number), like=base / file.name)
    for number, file in enumerate(todo.new):
        copied(file, folder / "new" / str(number))
        if (base / file.name).exists():
            shutil.copymode(base / file.name, folder / "new" / str(number))
    for part in parts:
        sync_folder(part)
    journal = _journal(base, todo, sums, report)
    write_journal(folder, journal)
    folder.replace(base / ARMED)
    sync_folder(base)
    return journal


def _journal(base: Path, todo: Todo, sums: dict[str, list[Any]], report: dict[str, Any]) -> Journal:
    sizes = {name: (base / name).stat().st_size for name in todo.patched}
    replaced, created = ([file.name for file in files] for files in (todo.replaced, todo.created))
    return Journal(PATCHING, sizes, replaced, created, _new_folders(base, created), sums, report, todo.renamed)


def finish(base: Path, journal: Journal, report: dict[str, Any]) -> None:
    """Say that the merge is complete: from here on only `undo` takes it back."""
    write_journal(base / ARMED, replace(journal, state=DONE, report=report))


def state_of(base: Path) -> str | None:
    """PATCHING, DONE, or None without a journal. Raises `MergeError` where it is damaged."""
    return read_journal(base).state if (base / ARMED).is_dir() else None


def read_journal(base: Path) -> Journal:
    """`journal.json`, if it is what was written. Raises `MergeError`."""
    path = base / ARMED / "journal.json"
    try:
        content = json.loads(path.read_bytes())
        found = content["journal"]
        if content["version"] != VERSION or content["sha256"] != _sum(found):
            raise ValueError("its checksum or version differs")
        journal = Journal(**found)
        names = (*journal.patched, *journal.replaced, *journal.created, *journal.folders)
        names = (*names, *journal.renamed, *journal.renamed.values())
        bad = [name for name in names if not is_safe(base, name)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    if bad:
        raise damaged(path, f"{bad[0]!r} is a link or lies outside of the base")
    return journal


def discard(base: Path) -> None:
    """Remove a journal that was never armed, or is not any more."""
    if (base / PARTIAL).exists():
        shutil.rmtree(base / PARTIAL)


def damaged(path: Path, why: str) -> MergeError:
    """The error of a journal that cannot be followed."""
    return MergeError(
        f"{path}: the undo journal is damaged ({why}), and nothing was touched; fetch the base again, or delete "
        f"{ARMED} in it to keep it as it is"
    )


def write_journal(folder: Path, journal: Journal) -> None:
    """Replace journal.json in one step."""
    content = {"version": VERSION, "sha256": _sum(vars(journal)), "journal": vars(journal)}
    fresh = folder / "journal.json.new"
    fresh.unlink(missing_ok=True)
    copied(_encoded(content), fresh)
    fresh.replace(folder / "journal.json")
    sync_folder(folder)


def copied(data: "bytes | PlannedFile", path: Path, like: Path | None = None) -> list[Any]:
    """Have `data` on disk as `path`, with mode and times of `like`. Returns its size and sha256."""
    parts = ((0, data),) if isinstance(data, bytes) else data.chunks()
    return _saved((part for _, part in parts), path, like)


def _saved(parts: Iterable[bytes], path: Path, like: Path | None = None) -> list[Any]:
    """The same, of parts. Each is hashed while it is written and the next one is made."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=CHUNK) as file, ThreadPoolExecutor(1) as beside:
        hashed = beside.submit(digest.update, b"")
        for part in parts:
            hashed.result()
            hashed = beside.submit(digest.update, part)
            file.write(part)
            size += len(part)
        hashed.result()
        file.flush()
        if like is not None:
            shutil.copystat(like, path)
        os.fsync(file.fileno())
    return [size, digest.hexdigest()]


def _originals(base: Path, todo: Todo) -> Iterator[bytes]:
    """What all ranges hold, a few MB at a time."""
    for name, ranges in todo.patched.items():
        with (base / name).open("rb", buffering=0) as file:
            parts, size = [], 0
            for begin, end in pieces(ranges):
                parts.append(os.pread(file.fileno(), end - begin, begin))
                if len(parts[-1]) != end - begin:
                    raise MergeError(f"{base / name}: ends before byte {end}; it became shorter meanwhile")
                size += end - begin
                if size >= CHUNK:
                    yield b"".join(parts)
                    parts, size = [], 0
            yield b"".join(parts)


def pieces(ranges: np.ndarray) -> Iterator[tuple[int, int]]:
    """`(begin, end)` of all bytes of the ranges, a chunk at most at a time."""
    for offset, length in ranges.tolist():
        for begin in range(offset, offset + length, CHUNK):
            yield begin, min(begin + CHUNK, offset + length)


def _numbered(todo: Todo) -> bytes:
    parts = [np.insert(ranges, 0, number, axis=1) for number, ranges in enumerate(todo.patched.values())]
    np.save(file := BytesIO(), np.concatenate([np.empty((0, 3), np.int64), *parts]))
    return file.getvalue()


def _new_folders(base: Path, created: list[str]) -> list[str]:
    parents = {parent.as_posix() for name in created for parent in PurePosixPath(name).parents if parent.name}
    return sorted(parent for parent in parents if not (base / parent).exists())


def _encoded(content: Any) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _sum(content: Any) -> str:
    return hashlib.sha256(_encoded(content)).hexdigest()
