"""Input files held open, so that the bytes read are the bytes validated, or an error says that they changed.

A base or a delta may be replaced, rewritten or truncated while it is read. Each input file is therefore opened once,
its identity is taken from the open descriptor, and reads compare against it. Descriptors are scarce (`ulimit -n`), so
the least recently used ones are closed, and reopened on demand; a file that has been replaced by then is refused.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from threading import Lock
from typing import TypeAlias
from weakref import ReferenceType, ref

import numpy as np
import numpy.typing as npt

from pema_adapters.errors import FormatError, InputChangedError, reading
from pema_adapters.io.file_identity import FileIdentity, read_identity

RawBytes = npt.NDArray[np.uint8]
Bytes: TypeAlias = "bytes | bytearray | memoryview"

_recording: ContextVar[list[InputFile] | None] = ContextVar("recorded", default=None)


class InputFile:
    """A regular file, opened for reading and checked for changes.

    Args:
        path: The file. A link is followed once, now.
        descriptor: An open descriptor of a file that may have no name any more; this object closes it.

    Attributes:
        identity: The file's identity when this object was made.

    Raises:
        FormatError: The file is missing, unreadable, or not a regular file.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self._is_pinned = False
        self._handle: OpenFile | None = _open(path) if descriptor is None else OpenFile(descriptor)
        with reading(path):
            self.identity = read_identity(self._handle.descriptor)
        _open_files.add(self)
        recorded = _recording.get()
        if recorded is not None:
            recorded.append(self)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.identity.size

    def __deepcopy__(self, memo: object) -> InputFile:
        return self

    def __repr__(self) -> str:
        return f"InputFile({str(self.path)!r}, {self.size:,} bytes)"

    def check(self, *, contents_only: bool = False) -> None:
        """Check that the file has not changed since it was opened.

        Args:
            contents_only: See `FileIdentity.describe_change`.

        Raises:
            InputChangedError: It has changed.
        """
        self._open_checked(contents_only)

    def open(self) -> OpenFile:
        """Return the open file, for system calls that copy; it stays open while the result is referenced."""
        handle = self._handle
        if handle is None:
            handle = self._handle = self._reopen()
        if not self._is_pinned:
            _open_files.add(self)
        return handle

    def pin(self) -> InputFile:
        """Keep the descriptor open for good, so that the file stays readable after it is unlinked; return self."""
        self.open()
        self._is_pinned = True
        _open_files.discard(self)
        return self

    def read(self, begin: int, end: int) -> bytes:
        """Read the bytes from `begin` to `end`.

        Raises:
            InputChangedError: The file ends before `end`.
        """
        handle = self.open()
        with reading(self.path):
            data = read_range(handle.descriptor, begin, end)
        if len(data) < end - begin:
            raise self.changed_error(f"it ends at byte {begin + len(data):,} now")
        return data

    def read_into(self, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `begin` on.

        Raises:
            InputChangedError: The file ends before the buffer is full.
        """
        handle, filled = self.open(), 0
        with reading(self.path):
            while filled < len(buffer):
                count = os.preadv(handle.descriptor, [buffer[filled:]], begin + filled)
                if not count:
                    raise self.changed_error(f"it ends at byte {begin + filled:,} now")
                filled += count

    def view(self, begin: int, end: int, *, contents_only: bool = False) -> RawBytes:
        """Return the bytes from `begin` to `end` as a read-only uint8 view of a memory map, after a `check`.

        Use the view at once and drop it: if the file were truncated later, reading the view would kill the process
        (SIGBUS).
        """
        handle = self._open_checked(contents_only)
        with reading(self.path):
            return handle.map()[begin:end]

    def changed_error(self, how: str) -> InputChangedError:
        """Return the error that says how the file has changed."""
        return InputChangedError(
            f"{self.path}: changed while it was in use: {how}; run again when nothing writes to it"
        )

    def _open_checked(self, contents_only: bool) -> OpenFile:
        handle = self.open()
        self._compare(handle, contents_only)
        return handle

    def _compare(self, handle: OpenFile, contents_only: bool = False) -> None:
        with reading(self.path):
            now = FileIdentity.from_descriptor(handle.descriptor)
        how = self.identity.describe_change(now, contents_only=contents_only)
        if how:
            raise self.changed_error(how)

    def _reopen(self) -> OpenFile:
        handle = _open(self.path)
        self._compare(handle)
        return handle


def read_range(descriptor: int, begin: int, end: int) -> bytes:
    """Read the bytes from `begin` to `end`, in as many calls as it takes; fewer bytes if the file ends earlier."""
    parts: list[bytes] = []
    while begin < end:
        part = os.pread(descriptor, end - begin, begin)
        if not part:
            break
        parts.append(part)
        begin += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_unchanged(files: Iterable[InputFile]) -> None:
    """Check every file for changes.

    Raises:
        InputChangedError: One has changed.
    """
    for file in files:
        file.check()


@contextmanager
def record_inputs() -> Iterator[list[InputFile]]:
    """Collect every `InputFile` opened in the block, so that all of them can be checked once more before committing."""
    files: list[InputFile] = []
    token = _recording.set(files)
    try:
        yield files
    finally:
        _recording.reset(token)


class OpenFile:
    """A descriptor that is closed with its last reference, and a memory map of the whole file, made on first use."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map: RawBytes | None = None

    def map(self) -> RawBytes:
        """Return all bytes of the file as a read-only uint8 view."""
        if self._map is None:
            size = os.fstat(self.descriptor).st_size
            data = mmap.mmap(self.descriptor, size, access=mmap.ACCESS_READ) if size else bytearray()
            self._map = np.frombuffer(data, dtype=np.uint8)
        return self._map

    def __del__(self, close=os.close) -> None:  # type: ignore[no-untyped-def] # bound now: os is gone at exit
        with suppress(OSError):  # it was only read
            close(self.descriptor)


class _RecentFiles:
    """The most recently used input files. An evicted file closes its descriptor, and reopens it when used."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._recent: OrderedDict[int, ReferenceType[InputFile]] = OrderedDict()
        self._limit = _max_open_files()

    def add(self, file: InputFile) -> None:
        """Record that `file`, which is open, was just used."""
        with self._lock:
            self._recent[id(file)] = ref(file)
            self._recent.move_to_end(id(file))
            while len(self._recent) > self._limit:
                oldest = self._recent.popitem(last=False)[1]()
                if oldest is not None:
                    oldest._handle = None

    def discard(self, file: InputFile) -> None:
        """Exempt `file` from eviction."""
        with self._lock:
            self._recent.pop(id(file), None)


def _max_open_files() -> int:
    """Return the limit: half of the process's, at two descriptors a file (its own, and its memory map's)."""
    try:
        import resource
    except ImportError:  # Windows
        return 64
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 256 if soft == resource.RLIM_INFINITY else max(4, min(256, soft // 4))


def _open(path: Path) -> OpenFile:
    with reading(path):
        handle = OpenFile(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)))
        mode = os.fstat(handle.descriptor).st_mode
    if not stat.S_ISREG(mode):
        kind = "is a directory" if stat.S_ISDIR(mode) else "it is a device or a pipe"
        raise FormatError(f"{path}: expected a file, but {kind}")
    return handle


_open_files = _RecentFiles()
