"""Advisory locks on files and folders, which keep two processes from changing the same checkpoint at once.

They are `flock` locks: one belongs to the open descriptor, ends with it or with the process, and excludes every other
descriptor, those of the same process included. Where the system or the file system has no such locks, there is none.
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

IS_AVAILABLE = fcntl is not None
"""Whether the system has `flock`."""

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""What network and user-space file systems answer where they have no locks."""


def check_platform() -> None:
    """Raise `MergeError` on a system that cannot merge: one without `flock`, which lacks `pread` as well."""
    if not IS_AVAILABLE:
        raise MergeError(
            "merging needs file locks and positional reads, which this system lacks (no fcntl module); merge on Linux "
            "or macOS, or on Windows in WSL"
        )


def lock_exclusive(descriptor: int) -> bool:
    """Lock an open file or folder against all other locks, without waiting.

    Returns:
        Whether it is locked; False where locks are not supported.

    Raises:
        BlockingIOError: another descriptor holds a lock.
    """
    return _lock(descriptor, exclusive=True)


def lock_shared(descriptor: int) -> bool:
    """Lock an open file or folder against exclusive locks; returns and raises as `lock_exclusive` does."""
    return _lock(descriptor, exclusive=False)


@contextmanager
def hold_lock(folder: Path, exclusive: bool, message: str) -> Iterator[None]:
    """Hold a lock on `folder` during the block: exclusive to change it, shared to read it.

    Args:
        folder: one that exists.
        exclusive: against all other locks, rather than against exclusive ones alone.
        message: what the error says after the folder's name, as in "another merge is running here; wait for it".

    Raises:
        MergeError: another process, or another block of this one, holds a lock that excludes this one.
        OSError: the folder cannot be opened.
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
        with suppress(OSError):  # the lock is gone all the same
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
