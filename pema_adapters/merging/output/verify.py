"""Proof that what lies on disk is what was planned: untouched bytes the base's, touched rows the delta's."""

import os
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.io.input_file import read_range
from pema_adapters.io.progress import Advance
from pema_adapters.merging.plan.plan import Plan, PlannedFile


def verify_plan(plan: Plan, folder: Path, advance: Advance) -> None:
    """Read every file of `folder` again and compare it with the plan. Raises `MergeError` at the first difference."""
    for file in plan.files:
        _verify_file(file, folder / file.name, advance)


def _verify_file(file: PlannedFile, path: Path, advance: Advance) -> None:
    with path.open("rb", buffering=0) as written:
        if hasattr(os, "posix_fadvise"):  # from the disk rather than from the page cache
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(written.fileno()).st_size
        if size != file.size:
            raise MergeError(f"{path}: has {size} bytes, expected {file.size}; the disk lost a write, nothing was kept")
        for offset, expected in file.chunks():
            if read_range(written.fileno(), offset, offset + len(expected)) != expected:
                raise MergeError(
                    f"{path}: bytes {offset} to {offset + len(expected)} are not those of base and delta; "
                    "the disk lost a write, or base or delta changed during the merge; nothing was kept"
                )
            advance(len(expected))
