"""A planned file as a file object, so that it can be uploaded without lying on a disk."""

import io
import os

from pema_adapters.io.progress import Advance
from pema_adapters.merging.plan.plan import PlannedFile

BUFFER = 256 << 10


def opened(file: PlannedFile, advance: Advance) -> io.BufferedReader:
    """The bytes of a planned file: seekable, read-only, computed as they are read. `advance` hears of each read."""
    return io.BufferedReader(_Raw(file, advance), BUFFER)


class _Raw(io.RawIOBase):
    """The unbuffered half."""

    def __init__(self, file: PlannedFile, advance: Advance) -> None:
        self.file, self.advance, self.at = file, advance, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.file.read(self.at, min(self.at + len(buffer), self.file.size))
        buffer[: len(data)] = data
        self.at += len(data)
        self.advance(len(data))
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.file.size}[whence]
        self.at = max(0, start + offset)
        return self.at

    def tell(self) -> int:
        return self.at
