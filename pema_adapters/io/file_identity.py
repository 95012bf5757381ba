"""The identity of a file, by which a change of the file is noticed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

CLOCK_TICK_NS = 10_000_000
"""File systems use the kernel's coarse clock for timestamps: two writes within a tick may get the same one."""


@dataclass(frozen=True)
class FileIdentity:
    """What distinguishes two states of a file, from `fstat`: size in bytes, times in ns."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def from_descriptor(cls, descriptor: int) -> FileIdentity:
        """Return the identity of an open file.

        Raises:
            OSError: `fstat` fails.
        """
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_same_file(self, path: Path) -> bool:
        """Return whether `path`, or the target of that link, is this file, changed or not."""
        try:
            found = path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)

    def describe_change(self, now: FileIdentity, *, contents_only: bool = False) -> str:
        """Describe how the file has changed, "" if it has not.

        Args:
            now: The identity of the same path at a later time.
            contents_only: Ignore changes of the inode alone (a rename, a new link, another mode).
        """
        if (self.device, self.inode) != (now.device, now.inode):
            return "another file replaced it"
        if self.size != now.size:
            return f"its size went from {self.size:,} to {now.size:,} bytes"
        if self.mtime_ns != now.mtime_ns:
            return "it was written to"
        if self.ctime_ns != now.ctime_ns and not contents_only:
            return "it was replaced or renamed, or its links, mode or times were changed"
        return ""


def read_identity(descriptor: int) -> FileIdentity:
    """Return the identity of an open file, once it is so old that any further write would change its timestamps."""
    identity = FileIdentity.from_descriptor(descriptor)
    age = time.time_ns() - max(identity.mtime_ns, identity.ctime_ns)
    if age >= CLOCK_TICK_NS:
        return identity
    time.sleep(min(CLOCK_TICK_NS, CLOCK_TICK_NS - age) / 1e9)
    return FileIdentity.from_descriptor(descriptor)
