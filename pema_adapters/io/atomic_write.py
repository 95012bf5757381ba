"""What every part does with whole files: sum them, and replace them in one go, or say before that it cannot be."""

import os
import secrets
from pathlib import Path

from pema_adapters.errors import FormatError


def check_replaceable(path: Path) -> None:
    """Refuse what `replace_file` could not write, before the work that its content takes. Raises FormatError."""
    if path.is_dir():
        raise FormatError(f"{path}: is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise FormatError(f"{path}: no such folder: {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise FormatError(f"{path}: nothing can be written in the folder {path.parent}")


def replace_file(path: Path, content: bytes) -> None:
    """Write beside `path`, sync, rename: a reader sees the old file or the new one, whatever happens."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    # mkstemp would leave mode 0600: os.open lets the umask decide, as for any other file
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
