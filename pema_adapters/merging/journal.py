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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.merging.plan import PlannedFile
from pema_adapters.merging.segments import CHUNK, Bytes
from pema_adapters.merging.write import sync_folder

ARMED = ".pema-undo"
PARTIAL = ".pema-undo.partial"
VERSION = 1
PATCHING, DONE = "patching", "done"


@dataclass(frozen=True)
class Todo:
    """What a merge does to its base. `patched`: by name, ranges int64 [n, 2] of (offset, length), none overlapping."""

    patched: dict[str, np.ndarray]
    replaced: tuple[PlannedFile, ...]
    created: tuple[PlannedFile, ...]

    @property
    def new(self) -> tuple[PlannedFile, ...]:
        """The files that are written whole."""
        return self.replaced + self.created

    def touches(self, name: str) -> bool:
        """Whether the file is written."""
        return name in self.patched or any(file.name == name for file in self.new)

    @property
    def journal_size(self) -> int:
        """Bytes that the journal takes until the merge is done, without those of `journal.json`."""
        ranges = sum(int(found[:, 1].sum()) + 24 * len(found) for found in self.patched.values())
        return ranges + sum(file.size for file in self.new) + CHUNK


@dataclass(frozen=True)
class Journal:
    """`journal.json`. `sums`: size and sha256 of every other file that a rollback reads."""

    state: str
    patched: dict[str, int]
    replaced: list[str]
    created: list[str]
    folders: list[str]
    sums: dict[str, list[Any]]
    report: dict[str, Any] = field(default_factory=dict)


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
    for part in (folder, folder / "saved", folder / "new"):
        part.mkdir()
    sums = {"undo.bin": _saved(_originals(base, todo), folder / "undo.bin")}
    sums["ranges.npy"] = _copied(_numbered(todo), folder / "ranges.npy")
    for number, file in enumerate(todo.replaced):
        data = (base / file.name).read_bytes()
        sums[f"saved/{number}"] = _copied(data, folder / "saved" / str(number), like=base / file.name)
    for number, file in enumerate(todo.new):
        _copied(file, folder / "new" / str(number))
        if (base / file.name).exists():
            shutil.copymode(base / file.name, folder / "new" / str(number))
    sizes = {name: (base / name).stat().st_size for name in todo.patched}
    replaced, created = ([file.name for file in files] for files in (todo.replaced, todo.created))
    journal = Journal(PATCHING, sizes, replaced, created, _new_folders(base, created), sums, report)
    _write(folder, journal)
    for part in (folder / "saved", folder / "new", folder):
        sync_folder(part)
    folder.replace(base / ARMED)
    sync_folder(base)
    return journal


def finish(base: Path, journal: Journal, report: dict[str, Any]) -> None:
    """Say that the merge is complete: from here on only `undo` takes it back."""
    _write(base / ARMED, replace(journal, state=DONE, report=report))


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
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    names = (*journal.patched, *journal.replaced, *journal.created, *journal.folders)
    if bad := [name for name in names if not is_safe(base, name)]:
        raise _damaged(path, f"{bad[0]!r} is a link or lies outside of the base")
    return journal


def is_safe(base: Path, name: str) -> bool:
    """Whether `name` lies in `base`, on a way without links: a journal may come with a base from anybody."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts:
        return False
    return not any(base.joinpath(*parts[:depth]).is_symlink() for depth in range(1, 1 + len(parts)))


def roll_back(base: Path) -> Journal:
    """Put the base back as it was and remove the journal. After a crash at any step, just do it again.

    Raises `MergeError` before anything is touched where the journal is damaged or a file is not the one it is about.
    """
    journal = read_journal(base)
    _check(base, journal)
    if journal.state == DONE:  # an undo that is cut off must be found unfinished
        _write(base / ARMED, replace(journal, state=PATCHING))
    _restore_ranges(base, journal)
    _restore_files(base, journal)
    discard(base)
    (base / ARMED).replace(base / PARTIAL)
    sync_folder(base)
    discard(base)
    return journal


def discard(base: Path) -> None:
    """Remove a journal that was never armed, or is not any more."""
    if (base / PARTIAL).exists():
        shutil.rmtree(base / PARTIAL)


def write_all(fd: int, data: Bytes, at: int) -> None:
    """Write all of `data` at the offset `at`."""
    done = os.pwrite(fd, data, at)
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], at + done)


def _check(base: Path, journal: Journal) -> None:
    for name, (size, expected) in journal.sums.items():
        path = base / ARMED / name
        if not path.is_file() or path.stat().st_size != size or _sum_of_file(path) != expected:
            raise _damaged(path, f"expected {size:,} bytes of sha256 {expected[:12]}...")
    for name, size in journal.patched.items():
        path = base / name
        found = path.stat().st_size if path.is_file() else "no"
        if found != size:
            raise MergeError(
                f"{path}: {found} bytes, expected {size}; it was changed after the merge in place, which can no "
                f"longer be undone; fetch the base again, or delete {ARMED} in it to keep it as it is"
            )


def _damaged(path: Path, why: str) -> MergeError:
    return MergeError(
        f"{path}: the undo journal is damaged ({why}), and nothing was touched; fetch the base again, or delete "
        f"{ARMED} in it to keep it as it is"
    )


def _restore_ranges(base: Path, journal: Journal) -> None:
    ranges = np.load(base / ARMED / "ranges.npy", allow_pickle=False)
    with (base / ARMED / "undo.bin").open("rb") as saved:
        for number, name in enumerate(journal.patched):
            fd = os.open(base / name, os.O_RDWR | os.O_NOFOLLOW)
            try:
                for begin, end in _pieces(ranges[ranges[:, 0] == number, 1:]):
                    write_all(fd, saved.read(end - begin), begin)
                os.fsync(fd)
            finally:
                os.close(fd)


def _restore_files(base: Path, journal: Journal) -> None:
    copy = base / ARMED / "restored"
    for number, name in enumerate(journal.replaced):
        saved = base / ARMED / "saved" / str(number)
        copy.unlink(missing_ok=True)
        _copied(saved.read_bytes(), copy, like=saved)
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


def _write(folder: Path, journal: Journal) -> None:
    """Replace journal.json in one step."""
    content = {"version": VERSION, "sha256": _sum(vars(journal)), "journal": vars(journal)}
    fresh = folder / "journal.json.new"
    fresh.unlink(missing_ok=True)
    _copied(_encoded(content), fresh)
    fresh.replace(folder / "journal.json")
    sync_folder(folder)


def _copied(data: "bytes | PlannedFile", path: Path, like: Path | None = None) -> list[Any]:
    """Have `data` on disk as `path`, with mode and times of `like`. Returns its size and sha256."""
    pieces = ((0, data),) if isinstance(data, bytes) else data.chunks()
    return _saved((piece for _, piece in pieces), path, like)


def _saved(pieces: Iterable[bytes], path: Path, like: Path | None = None) -> list[Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=CHUNK) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        if like is not None:
            shutil.copystat(like, path)
        os.fsync(file.fileno())
    return [size, digest.hexdigest()]


def _originals(base: Path, todo: Todo) -> Iterator[bytes]:
    for name, ranges in todo.patched.items():
        with (base / name).open("rb", buffering=0) as file:
            for begin, end in _pieces(ranges):
                data = os.pread(file.fileno(), end - begin, begin)
                if len(data) != end - begin:
                    raise MergeError(f"{base / name}: ends before byte {end}; it became shorter meanwhile")
                yield data


def _pieces(ranges: np.ndarray) -> Iterator[tuple[int, int]]:
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


def _sum_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()
