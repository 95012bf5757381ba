"""The output folder: what it may be, and how it appears all at once."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pema_adapters.errors import MergeError, PemaError
from pema_adapters.formats.delta_discovery import MERGE_MANIFEST
from pema_adapters.io.interrupts import defer_interrupts
from pema_adapters.io.locking import lock_exclusive
from pema_adapters.merging.output.manifest import find_foreign_files
from pema_adapters.merging.output.writer import sync_folder

DEFAULT = "merged"
NOTHING_LEFT = "nothing was left behind"


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
    _check_earlier_output(target, overwrite)


def check_replaceable(target: Path, overwrite: bool, names: Collection[str]) -> None:
    """Refuse to replace anything but the files of an earlier merge; `names` are those that this one writes."""
    if not _check_earlier_output(target, overwrite):
        return
    foreign = find_foreign_files(target, names)
    if foreign:
        raise MergeError(
            f"output {target} {foreign}, and --overwrite would lose them; move them away, choose another folder with "
            "--output, or delete the folder if you need nothing in it"
        )


def _check_earlier_output(target: Path, overwrite: bool) -> bool:
    """Return whether an earlier merge wrote the target; False if nothing is there. Raises `MergeError` otherwise."""
    if target.exists() and not target.is_dir():
        raise MergeError(f"output {target} is a file; expected a folder that does not exist yet")
    if not target.exists() or not any(target.iterdir()):
        return False
    if not (target / MERGE_MANIFEST).is_file():
        raise MergeError(
            f"output {target} exists and was not written by a merge (it holds no {MERGE_MANIFEST}); "
            "choose another folder with --output"
        )
    if not overwrite:
        raise MergeError(f"output {target} exists from an earlier merge; replace it with --overwrite")
    return True


@dataclass
class Stage:
    """The staging folder, and notes for the report."""

    folder: Path
    notes: list[str] = field(default_factory=list)


@contextmanager
def stage_output(target: Path, overwrite: bool, names: Collection[str]) -> Iterator[Stage]:
    """Give an empty folder beside `target` that becomes `target` when the block ends, and vanishes if it fails.

    Args:
        target: the output folder.
        overwrite: whether the output of an earlier merge may be replaced.
        names: the files that the block writes.

    Raises:
        MergeError: the target cannot be replaced, or the system refused; the message says what is left.
        KeyboardInterrupt: its text says what is left.
    """
    stage = target.with_name(f".{target.name}.pema-partial")
    made = [folder for folder in target.parents if not folder.exists()]
    is_complete = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(stage)
        try:
            _recover(target, names)
            check_replaceable(target, overwrite, names)
            yield (given := Stage(stage))
            check_replaceable(target, overwrite, names)  # again: hours may have passed
            with defer_interrupts():
                _commit(stage, target)
                is_complete = True
                given.notes += _discard_replaced(target, names)
                sync_folder(target.parent)
        except BaseException:
            if not is_complete:
                shutil.rmtree(stage, ignore_errors=True)
                _remove_empty(made)
            raise
        finally:
            os.close(lock)
    except PemaError:
        raise
    except OSError as error:
        left = _describe_leftovers(stage, target, is_complete)
        raise MergeError(f"{error.filename or target}: {error.strerror or error}; {left}") from error
    except KeyboardInterrupt as error:
        raise type(error)(_describe_leftovers(stage, target, is_complete)) from None


def _describe_leftovers(stage: Path, target: Path, is_complete: bool) -> str:
    if is_complete:
        return f"{target} is complete"
    return f"{stage} is incomplete and could not be removed" if stage.exists() else NOTHING_LEFT


def _acquire(stage: Path) -> int:
    """Make the staging folder, or take over what a killed merge left of it; the lock tells the two apart."""
    is_new = not stage.exists()
    fd = None
    try:
        stage.mkdir(exist_ok=True)
        fd = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        _lock(fd, stage)
        for leftover in stage.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
    except BaseException:
        if fd is not None:
            os.close(fd)
        if is_new:
            _remove_empty([stage])
        raise
    return fd


def _lock(fd: int, stage: Path) -> None:
    try:
        lock_exclusive(fd)
        if not os.path.samestat(os.fstat(fd), stage.stat(follow_symlinks=False)):
            raise FileNotFoundError  # it was renamed into place between the two calls
    except (BlockingIOError, FileNotFoundError):
        raise MergeError(f"{stage}: another merge is writing this output; wait for it, or choose --output") from None


def _commit(stage: Path, target: Path) -> None:
    """Rename the staged folder into place; the output of an earlier merge moves aside first, and back if that fails."""
    aside = _get_replaced_path(target)
    if target.exists() and any(target.iterdir()):
        target.replace(aside)
    try:
        stage.replace(target)
    except OSError as error:
        left = _restore_earlier(aside, target)
        raise MergeError(f"{target}: cannot be put in place ({error.strerror}); {left}") from error


def _restore_earlier(aside: Path, target: Path) -> str:
    """Put the earlier output back, if there was one. Returns the end of the error message."""
    try:
        if aside.exists():
            aside.replace(target)
    except OSError as error:
        return f"the earlier output could not be put back ({error.strerror}): rename {aside}"
    return NOTHING_LEFT


def _discard_replaced(target: Path, names: Collection[str]) -> list[str]:
    """Remove the output that was replaced. Returns a note where that fails."""
    aside = _get_replaced_path(target)
    try:
        if not aside.exists():
            return []
        foreign = find_foreign_files(aside, names)
        if foreign:  # they came after the last look
            return [f"the replaced output {foreign} and was kept: {aside}"]
        shutil.rmtree(aside)
    except OSError as error:
        return [f"the replaced output could not be removed ({error.strerror or error}); delete {aside}"]
    return []


def _recover(target: Path, names: Collection[str]) -> None:
    """Put an earlier output back that a killed merge left aside, or remove it where a newer one took its place.

    Raises `MergeError` where it holds files of somebody else: `_discard_replaced` kept it for them.
    """
    aside = _get_replaced_path(target)
    if not aside.exists():
        return
    if not target.exists() or not any(target.iterdir()):
        aside.replace(target)
        return
    foreign = find_foreign_files(aside, names)
    if foreign:
        raise MergeError(f"{aside}: the output that an earlier merge replaced {foreign}; move it away, or delete it")
    shutil.rmtree(aside)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _get_replaced_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.pema-replaced")
