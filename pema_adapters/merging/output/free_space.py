"""Disk space: the size of a plan, less the blocks that the file system can clone from the base."""

import math
import shutil
import tempfile
from itertools import chain
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.merging.output.writer import clone_range
from pema_adapters.merging.plan.plan import Plan
from pema_adapters.merging.plan.segments import BLOCK, CopySegment, RowsSegment, Segment


def check_space(plan: Plan, folder: Path) -> None:
    """Refuse where the file system of `folder` has not enough space for the plan. Raises `MergeError`."""
    needed = plan.size
    if _free_bytes(folder) < needed and _can_clone(plan, folder):
        needed = _size_without_clones(plan)
    check_free(folder.parent, needed)


def check_free(folder: Path, size: int) -> None:
    """Refuse where the file system of `folder` has less than `size` bytes free. Raises `MergeError`."""
    free = _free_bytes(folder)
    if free < size:
        raise MergeError(f"{folder}: {free:,} bytes free, but the merge takes {size:,}; free some or choose --output")


def _free_bytes(folder: Path) -> float:
    """Return the free bytes; no limit on a file system without a size, such as /proc, which reports 0 of 0."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf


def _can_clone(plan: Plan, folder: Path) -> bool:
    """Find out by a trial whether the file system clones the base's blocks into `folder`."""
    places = _clonable_copies(plan)
    source = next((copy for copy, _ in places), None)
    if source is None:
        return False
    start = -(-source.start // BLOCK) * BLOCK
    with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
        return clone_range(probe.fileno(), source.file.open().descriptor, start, 0, BLOCK)


def _size_without_clones(plan: Plan) -> int:
    """Return an upper bound of the bytes written beside the clones: the ends of each, and blocks with other rows."""
    saved = sum(copy.length - 2 * BLOCK - rewritten for copy, rewritten in _clonable_copies(plan))
    return max(plan.size - saved, 0)


def _clonable_copies(plan: Plan) -> list[tuple[CopySegment, int]]:
    """Return the copies of the base whose blocks keep their alignment, and the bytes rewritten in each."""
    placed = chain.from_iterable(zip(file.starts, file.segments, strict=False) for file in plan.files)
    found = [(start, *_copy_below(segment)) for start, segment in placed]
    return [
        (copy, rewritten)
        for start, copy, rewritten in found
        if copy is not None and (copy.start - start) % BLOCK == 0 and copy.length > 2 * BLOCK + rewritten
    ]


def _copy_below(segment: Segment) -> tuple[CopySegment | None, int]:
    if isinstance(segment, RowsSegment) and isinstance(segment.base, CopySegment):
        blocks = len(segment.token_ids) * (1 + -(-segment.row_bytes // BLOCK))
        return segment.base, blocks * BLOCK
    return (segment, 0) if isinstance(segment, CopySegment) and segment.of_base else (None, 0)
