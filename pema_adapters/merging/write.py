"""Plan -> disk: copies by the kernel, rows laid over them window by window, one fsync a file."""

import errno
import os
from collections.abc import Iterator
from functools import singledispatch
from pathlib import Path

from pema_adapters.errors import FormatError
from pema_adapters.merging.plan import CHUNK, Bytes, Copy, Plan, PlannedFile, Rows, Segment
from pema_adapters.merging.progress import Advance

WINDOW = 64 << 20
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY, errno.ENOTSOCK}


def write_plan(plan: Plan, folder: Path, advance: Advance) -> None:
    """Write every file of the plan into the empty `folder`, and have it all on disk before returning.

    Memory stays within a few chunks, whatever the size. Raises OSError as the system does (disk full, say).
    """
    for file in plan.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(file, path, advance)
    for inside in {folder, *((folder / file.name).parent for file in plan.files)}:
        sync_folder(inside)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_file(file: PlannedFile, path: Path, advance: Advance) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for start, segment in zip(file.starts, file.segments, strict=False):
            _lay(segment, fd, start, advance)
        os.fsync(fd)
    finally:
        os.close(fd)


@singledispatch
def _lay(segment: Segment, fd: int, start: int, advance: Advance) -> None:
    """Write a segment at the offset `start`."""
    for begin in range(0, segment.length, CHUNK):
        end = min(begin + CHUNK, segment.length)
        _write(fd, segment.read(begin, end), start + begin)
        advance(end - begin)


@_lay.register
def _(segment: Copy, fd: int, start: int, advance: Advance) -> None:
    for begin, end in _copied(segment, fd, start):
        _to_disk(fd, start + begin, start + end)
        advance(end - begin)


@_lay.register
def _(segment: Rows, fd: int, start: int, advance: Advance) -> None:
    """Rows follow the copy window by window, so that no page is on its way to the disk twice."""
    runs = segment.runs()
    run = next(runs, None)
    for begin, end in _copied(segment.base, fd, start):
        while run is not None and run[0] + len(run[1]) <= end:
            _write(fd, run[1], start + run[0])
            run = next(runs, None)
        _to_disk(fd, start + begin, start + end)
        advance(end - begin)
    while run is not None:
        _write(fd, run[1], start + run[0])
        run = next(runs, None)
    advance(segment.length - segment.base.length)


def _copied(segment: Copy, fd: int, start: int) -> Iterator[tuple[int, int]]:
    """Copy to the offset `start`; give `(begin, end)` of every window that is there."""
    source = os.open(segment.path, os.O_RDONLY)
    try:
        done = 0
        while done < segment.length:
            span = source, fd, segment.start + done, start + done, segment.length - done
            count = _by_kernel(*span) or _by_hand(*span)
            if not count:
                raise FormatError(f"{segment.path}: ends at byte {segment.start + done}; it became shorter meanwhile")
            yield done, done + count
            done += count
    finally:
        os.close(source)


def _to_disk(fd: int, begin: int, end: int) -> None:
    """Let the system start to write a window now rather than at the fsync; a hint, which waits for nothing."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _by_kernel(source: int, target: int, at: int, to: int, left: int) -> int:
    """Copy up to a chunk without its bytes passing through this process. Returns how many; 0 where it cannot."""
    count = min(left, WINDOW)
    try:
        if hasattr(os, "copy_file_range"):
            return os.copy_file_range(source, target, count, at, to)
        os.lseek(target, to, os.SEEK_SET)
        return os.sendfile(target, source, at, count)
    except OSError as error:
        if error.errno in _CANNOT:
            return 0
        raise


def _by_hand(source: int, target: int, at: int, to: int, left: int) -> int:
    return _write(target, os.pread(source, min(left, CHUNK), at), to)


def _write(fd: int, data: Bytes, at: int) -> int:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], at + done)
    return done
