"""The exceptions that pema_adapters raises on purpose, all derived from `PemaError`.

Each message is one line: where, what is wrong, what was found and expected, and what to do. The command line prints it
and exits with code 1. Library users catch `PemaError`, or the subclass that they care about.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pema_adapters.io.escaping import escape_terminal


class PemaError(Exception):
    """Base class of all errors of this package. The message is escaped to one printable line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(escape_terminal(message))


class VocabularyError(PemaError, ValueError):
    """Invalid token ids, or a vocabulary that does not fit the model."""


class SurgeryError(PemaError, ValueError):
    """The embedding of this model cannot be shrunk, restored or saved as requested."""


class UnseenTokenError(PemaError, ValueError):
    """A token outside the partial vocabulary was met where none is allowed."""


class TokenRangeError(PemaError, IndexError):
    """A token id outside [0, V)."""


class FormatError(PemaError, ValueError):
    """A file is missing, damaged, or not what its name promises."""


class InputChangedError(FormatError):
    """A base or delta was replaced, rewritten or truncated while it was read."""


class BaseMismatchError(PemaError, ValueError):
    """The delta was trained on a base other than the given one."""


class MergeError(PemaError, RuntimeError):
    """The merge was refused or failed; no half-written output remains."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a `FormatError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {str(error.strerror or error).lower()}") from None
