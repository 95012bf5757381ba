"""Replace a file atomically, and check beforehand that this will be possible."""

import os
import secrets
from pathlib import Path

from pema_adapters.errors import FormatError


def check_replaceable(path: Path) -> None:
    """Check that `replace_file(path, ...)` can work, before computing the content.

    Raises:
        FormatError: `path` is a folder, or its parent folder is missing or not writable.
    """
    if path.is_dir():
        raise FormatError(f"{path}: is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise FormatError(f"{path}: no such folder: {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise FormatError(f"{path}: the folder {path.parent} is not writable")


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: write a temporary file beside it, fsync, rename.

    Raises:
        OSError: The file cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    # mkstemp would leave mode 0600; os.open lets the umask decide, as for any other file
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
