"""Links in a base or a delta, which may come from anybody: they are not followed to files of somebody else."""

import os
from pathlib import Path, PurePath

from pema_adapters.errors import FormatError

MAX_NAME_BYTES = 255
"""Bytes of UTF-8."""


def is_plain_name(name: str) -> bool:
    """Whether a name is one of a file or folder right here, on every system."""
    return PurePath(name).name == name and name not in ("", "..") and not set(name) & set("\\/\0")


def is_folder_name(name: str) -> bool:
    """Whether a folder can have this name, on every usual file system."""
    try:
        return is_plain_name(name) and len(name.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def check_link(path: Path, folder: Path) -> None:
    """Refuse a link at or on the way to `path`, below `folder`, whose target would be published with the output.

    Its target may be a file of the folder that is not hidden, or, where the folder is a snapshot in the Hub's cache, a
    file of that repository's `blobs`. `folder` itself may be a link: the caller named it.

    Raises:
        FormatError: the link leads elsewhere, or nowhere.
    """
    if path.is_symlink() and not path.exists():
        raise FormatError(f"{path}: is a link to {path.readlink()}, which does not exist; fetch it, or delete the link")
    top, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if target == top / path.relative_to(folder) or target.parent == _blobs(top) or _is_visible(target, top):
        return
    raise FormatError(
        f"{path}: is a link to {target}, outside of {folder} or hidden in it, and would be copied into the output; "
        "replace it by a copy, or delete it"
    )


def _is_visible(target: Path, top: Path) -> bool:
    return target.is_relative_to(top) and not any(part.startswith(".") for part in target.relative_to(top).parts)


def _blobs(folder: Path) -> Path | None:
    """Where the files of a snapshot in the Hub's cache lie; None for any other folder."""
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots" and snapshot.parents[1].name.startswith("models--"):
            return snapshot.parents[1] / "blobs"
    return None
