"""A planned file as a file object, so that it can be uploaded without lying on a disk."""

import io
import os
from collections.abc import Callable

from pema_adapters.io.progress import Advance
from pema_adapters.merging.plan.plan import PlannedFile

BUFFER = 256 << 10


def open_stream(file: PlannedFile, advance: Advance, check: Callable[[], object]) -> io.BufferedReader:
    """Open the content of a planned file: seekable, read-only, computed as it is read.

    Args:
        advance: called with the number of bytes after each read.
        check: called after the last read; raises `InputChangedError` if an input changed under the plan.
    """
    return io.BufferedReader(_Raw(file, advance, check), BUFFER)


class _Raw(io.RawIOBase):
    """The unbuffered half."""

    def __init__(self, file: PlannedFile, advance: Advance, check: Callable[[], object]) -> None:
        self.file, self.advance, self.check, self.at = file, advance, check, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.file.read(self.at, min(self.at + len(buffer), self.file.size))
        buffer[: len(data)] = data
        self.at += len(data)
        if self.at >= self.file.size:
            self.check()
        self.advance(len(data))
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.file.size}[whence]
        self.at = max(0, start + offset)
        return self.at

    def tell(self) -> int:
        return self.at
