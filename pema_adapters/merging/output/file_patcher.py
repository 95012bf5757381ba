"""A file that is written over here and there, on its way to the disk while more of it is made."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pema_adapters.io.input_file import Bytes

STEP = 16 << 20
"""So many bytes are written before the disk is asked to take them."""


class Patcher:
    """A file being written over; `written` counts the bytes."""

    def __init__(self, fd: int, executor: Executor) -> None:
        self.fd, self.written = fd, 0
        self._executor, self._asked = executor, 0
        self._pending: Future[None] | None = None

    def write(self, data: Bytes, at: int) -> None:
        """Write all of `data` at the offset `at`. The disk gets it soon, rather than all of the file at the end."""
        write_all(self.fd, data, at)
        self.written += len(data)
        if self.written - self._asked >= STEP and (self._pending is None or self._pending.done()):
            self.wait()
            self._pending, self._asked = self._executor.submit(_sync, self.fd), self.written

    def wait(self) -> None:
        """Have what the disk was asked for on it. Raises OSError where that failed: the system tells it only once."""
        if self._pending is not None:
            self._pending.result()


@contextmanager
def open_patcher(path: Path) -> Iterator[Patcher]:
    """Write over the file `path`, which is no link; all is on disk when the block ends."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        with ThreadPoolExecutor(1) as executor:
            patcher = Patcher(fd, executor)
            yield patcher
            patcher.wait()
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)


def write_all(fd: int, data: Bytes, at: int) -> None:
    """Write all of `data` at the offset `at`."""
    done = os.pwrite(fd, data, at)
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], at + done)
