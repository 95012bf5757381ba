"""Advisory locks on files and folders, which keep two processes from changing the same checkpoint at once.

These are `flock` locks: a lock belongs to an open descriptor, ends with it or with the process, and excludes every
other descriptor, even of the same process. On systems and file systems without `flock`, nothing is locked.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pema_adapters.errors import MergeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BUSY = "another merge is changing or reading it; wait for that to end"
"""What `hold_lock` says of a base or delta in use."""
IS_AVAILABLE = fcntl is not None
"""Whether the system has `flock`."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""The errors of network and user-space file systems that have no locks."""


def check_platform() -> None:
    """Check that this system can merge.

    Raises:
        MergeError: It has no `flock`; such systems lack `pread` as well.
    """
    if not IS_AVAILABLE:
        raise MergeError(
            "merging needs file locks and positional reads, which this system lacks (no fcntl module); merge on Linux "
            "or macOS, or on Windows in WSL"
        )


def lock_exclusive(descriptor: int) -> bool:
    """Take an exclusive lock on an open file or folder, without waiting.

    Returns:
        Whether it is locked; False if locks are not supported here.

    Raises:
        BlockingIOError: Another descriptor holds a lock.
    """
    return _lock(descriptor, exclusive=True)


def lock_shared(descriptor: int) -> bool:
    """Take a shared lock on an open file or folder; returns and raises like `lock_exclusive`."""
    return _lock(descriptor, exclusive=False)


@contextmanager
def hold_lock(folder: Path, exclusive: bool, message: str) -> Iterator[None]:
    """Hold a lock on `folder` during the block: exclusive to change it, shared to read it.

    Args:
        folder: An existing folder.
        exclusive: Exclude all other locks; else only exclusive ones.
        message: What the error says after the folder's name, "another merge is running here; wait for it" for example.

    Raises:
        MergeError: Another process, or another block of this one, holds a conflicting lock.
        OSError: The folder cannot be opened.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            _lock(descriptor, exclusive)
        except BlockingIOError:
            raise MergeError(f"{folder}: {message}") from None
        yield
    finally:
        with suppress(OSError):  # the lock is released all the same
            os.close(descriptor)


def _lock(descriptor: int, exclusive: bool) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True
