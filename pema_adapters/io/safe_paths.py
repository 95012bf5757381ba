"""Checks of names and links in a checkpoint from an untrusted source, so that none leads outside its folder."""

import os
from pathlib import Path, PurePath

from pema_adapters.errors import FormatError

MAX_NAME_BYTES = 255
"""The limit of common file systems, in bytes of UTF-8."""


def is_plain_name(name: str) -> bool:
    """Return whether `name` is a single path component on every system: no separator, not "..", no NUL."""
    return PurePath(name).name == name and name not in ("", "..") and not set(name) & set("\\/\0")


def is_folder_name(name: str) -> bool:
    """Return whether a folder can have this name on every common file system."""
    try:
        return is_plain_name(name) and len(name.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate
        return False


def check_link(path: Path, folder: Path) -> None:
    """Refuse `path` if a link, in it or at its end, would copy a foreign file into the output.

    The target may be a visible file of `folder` or, if `folder` is a snapshot in the Hub's cache, a file of that
    repository's `blobs`. `folder` itself may be a link: the caller chose it.

    Args:
        path: A file below `folder`.
        folder: The folder of the checkpoint.

    Raises:
        FormatError: The link is broken or leads elsewhere.
    """
    if path.is_symlink() and not path.exists():
        raise FormatError(f"{path}: is a link to {path.readlink()}, which does not exist; fetch it, or delete the link")
    top, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if target == top / path.relative_to(folder) or target.parent == _find_blobs(top) or _is_visible(target, top):
        return
    raise FormatError(
        f"{path}: is a link to {target}, outside {folder} or hidden in it, and would be copied into the output; "
        "replace it with a copy, or delete it"
    )


def _is_visible(target: Path, top: Path) -> bool:
    return target.is_relative_to(top) and not any(part.startswith(".") for part in target.relative_to(top).parts)


def _find_blobs(folder: Path) -> Path | None:
    """Return the `blobs` folder of a snapshot in the Hub's cache, None for any other folder."""
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots" and snapshot.parents[1].name.startswith("models--"):
            return snapshot.parents[1] / "blobs"
    return None
