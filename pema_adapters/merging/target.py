"""The output folder: what it may be, and how it appears all at once."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.find import MARKER
from pema_adapters.merging.write import sync_folder

DEFAULT = "merged"


def check_target(target: Path, *, base: Path, deltas: tuple[Path, ...], overwrite: bool) -> None:
    """Refuse an output that is, holds or lies in the base or the delta, or that would replace something else.

    All paths are resolved. `deltas`: the folder given and the one found in it; `merged` below the former is fine.
    """
    default = deltas[0] / DEFAULT
    for kind, folder in (("base", base), *(("delta", delta) for delta in deltas)):
        if target == folder:
            raise MergeError(f"output {target} is the {kind} itself; choose another folder with --output")
        if target in folder.parents:
            raise MergeError(f"output {target} holds the {kind} {folder}; choose another folder with --output")
        if folder in target.parents and not (kind == "delta" and target == default):
            raise MergeError(f"output {target} lies inside the {kind} {folder}; choose another folder with --output")
    _check_replaceable(target, overwrite)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise MergeError(f"output {target} is a file; expected a folder that does not exist yet")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / MARKER).is_file():
        raise MergeError(
            f"output {target} exists and was not written by a merge (it holds no {MARKER}); "
            "choose another folder with --output"
        )
    if not overwrite:
        raise MergeError(f"output {target} exists from an earlier merge; replace it with --overwrite")


def check_space(target: Path, size: int) -> None:
    """Refuse where the file system lacks room for `size` bytes."""
    parent = next(folder for folder in target.parents if folder.exists())
    usage = shutil.disk_usage(parent)
    free = usage.free
    if usage.total and free < size:  # a file system without a size, such as /proc, says 0 of 0
        raise MergeError(f"{parent}: {free:,} bytes free, but the merge takes {size:,}; free some or choose --output")


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder beside `target` that becomes `target` when the block ends, and vanishes if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.pema-partial")
    lock = _claim(stage)
    try:
        try:
            yield stage
            _check_replaceable(target, overwrite)  # again: hours may have passed
            _commit(stage, target)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _claim(stage: Path) -> int:
    """Make the staging folder, or take over what a killed merge left of it; the lock tells the two apart."""
    stage.mkdir(exist_ok=True)
    fd = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), stage.stat(follow_symlinks=False)):
            raise FileNotFoundError  # it was renamed into place between the two calls
    except (BlockingIOError, FileNotFoundError):
        os.close(fd)
        raise MergeError(f"{stage}: another merge is writing this output; wait for it, or choose --output") from None
    for leftover in stage.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return fd


def _commit(stage: Path, target: Path) -> None:
    """Rename the staged folder into place; an earlier merge moves aside first, and comes back if that fails."""
    aside = target.with_name(f".{target.name}.pema-replaced")
    shutil.rmtree(aside, ignore_errors=True)
    replaced = target.exists() and any(target.iterdir())
    if replaced:
        target.replace(aside)
    try:
        stage.replace(target)
    except OSError as error:
        if replaced:
            aside.replace(target)
        raise MergeError(f"{target}: cannot be put in place ({error.strerror}); nothing was left there") from error
    sync_folder(target.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)
