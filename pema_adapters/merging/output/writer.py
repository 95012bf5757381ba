"""Plan -> disk: copies by the kernel, rows laid over them window by window, one fsync a file."""

import errno
import os
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import singledispatch
from pathlib import Path

from pema_adapters.io.input_file import Bytes
from pema_adapters.io.progress import Advance
from pema_adapters.merging.output.file_patcher import write_all
from pema_adapters.merging.plan.plan import Plan, PlannedFile
from pema_adapters.merging.plan.segments import BLOCK, CHUNK, CopySegment, RowsSegment, Segment

WINDOW = 256 << 20
WRITEBACK_BYTES = 16 << 20
_UNSUPPORTED = {
    errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY, errno.ENOTSOCK, errno.ENOTTY,
}  # fmt: skip
_FICLONERANGE = 0x4020940D


def write_plan(plan: Plan, folder: Path, advance: Advance) -> int:
    """Write every file of the plan into the empty `folder`, and have it all on disk before returning.

    Returns how many bytes the file system cloned: they share the base's blocks until somebody changes them.
    Memory stays within a few chunks, whatever the size. Raises OSError as the system does (disk full, say).
    """
    cloned = 0
    for file in plan.files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        cloned += _write_file(file, path, advance)
    for inside in {folder, *((folder / file.name).parent for file in plan.files)}:
        sync_folder(inside)
    return cloned


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def clone_range(target: int, source: int, at: int, to: int, length: int) -> bool:
    """Share whole blocks of one open file with another. Returns whether the file system can."""
    import fcntl

    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, at, length, to))
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


class OutputFile:
    """A file being written; `advance` hears of every byte. `cloned` counts those that share the source's blocks."""

    def __init__(self, fd: int, executor: Executor, advance: Advance) -> None:
        self.fd, self.executor, self.advance = fd, executor, advance
        self.cloned = 0
        self.can_clone = sys.platform == "linux"

    def clone(self, source: int, at: int, to: int, length: int) -> int:
        """Share whole blocks with the source file. Returns how many bytes; 0 where the file system cannot."""
        if not self.can_clone or at % BLOCK or to % BLOCK or length % BLOCK:
            return 0
        self.can_clone = clone_range(self.fd, source, at, to, length)
        self.cloned += length * self.can_clone
        return length * self.can_clone

    def write(self, data: Bytes, at: int) -> int:
        """Write all of `data` at the offset `at`. Returns how much that is."""
        write_all(self.fd, data, at)
        return len(data)

    def start_writeback(self, begin: int, end: int) -> None:
        """Say that a range is final, so that the disk gets it now rather than at the fsync, while copying goes on.

        The advice starts the writing and drops pages that are clean already. It may block, hence the other thread.
        """
        if end - begin >= WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            self.executor.submit(os.posix_fadvise, self.fd, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _write_file(file: PlannedFile, path: Path, advance: Advance) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with ThreadPoolExecutor(1) as executor:
            sink = OutputFile(fd, executor, advance)
            for start, segment in zip(file.starts, file.segments, strict=False):
                write_segment(segment, sink, start)
        os.fsync(fd)
        return sink.cloned
    finally:
        os.close(fd)


@singledispatch
def write_segment(segment: Segment, sink: OutputFile, start: int) -> None:
    """Write a segment at the offset `start`."""
    for begin in range(0, segment.length, CHUNK):
        end = min(begin + CHUNK, segment.length)
        sink.advance(sink.write(segment.read(begin, end), start + begin))


@write_segment.register
def _(segment: CopySegment, sink: OutputFile, start: int) -> None:
    for begin, end in _copy_windows(segment, sink, start):
        sink.start_writeback(start + begin, start + end)
        sink.advance(end - begin)


@write_segment.register
def _(segment: RowsSegment, sink: OutputFile, start: int) -> None:
    """Let rows follow the copy window by window, so that no page goes to the disk twice."""
    if not isinstance(segment.base, CopySegment):  # numbers that are cast on the way
        write_segment.dispatch(object)(segment, sink, start)
        return
    changes = segment.changes()
    change = next(changes, None)
    for begin, end in _copy_windows(segment.base, sink, start):
        while change is not None and change[0] + len(change[1]) <= end:
            sink.write(change[1], start + change[0])
            change = next(changes, None)
        sink.start_writeback(start + begin, start + end)
        sink.advance(end - begin)
    while change is not None:
        sink.write(change[1], start + change[0])
        change = next(changes, None)
    sink.advance(segment.length - segment.base.length)


def _copy_windows(segment: CopySegment, sink: OutputFile, start: int) -> Iterator[tuple[int, int]]:
    """Copy to the offset `start`; give `(begin, end)` of every window that is there."""
    source = segment.file.open()
    done = 0
    while done < segment.length:
        at, to = segment.start + done, start + done
        left = _align_to_block(at, to, segment.length - done)
        descriptor = source.descriptor
        count = sink.clone(descriptor, at, to, left) or _copy_in_kernel(descriptor, sink.fd, at, to, left)
        count = count or sink.write(segment.file.read(at, at + min(left, CHUNK)), to)
        yield done, done + count
        done += count


def _align_to_block(at: int, to: int, left: int) -> int:
    """Return how much to copy at once: up to the next common block boundary, then whole blocks."""
    if (at - to) % BLOCK or left < 2 * BLOCK:
        return left
    return BLOCK - at % BLOCK if at % BLOCK else left - left % BLOCK


def _copy_in_kernel(source: int, target: int, at: int, to: int, left: int) -> int:
    """Copy up to a window without its bytes passing through this process. Returns how many; 0 if it cannot."""
    count = min(left, WINDOW)
    try:
        if hasattr(os, "copy_file_range"):
            return os.copy_file_range(source, target, count, at, to)
        os.lseek(target, to, os.SEEK_SET)
        return os.sendfile(target, source, at, count)
    except OSError as error:
        if error.errno in _UNSUPPORTED or error.errno == errno.EIO:  # of which file, reading and writing will tell
            return 0
        raise
