"""Every exception that pema_adapters raises on purpose, as one small tree.

Each message is one line that says what is wrong, where, what was found, what was expected and what to do. The command
line prints it and exits with 1; library users may catch `PemaError` or the kind they care about.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pema_adapters.io.escaping import escape_terminal


class PemaError(Exception):
    """Base of all errors of this package. Its message is one line, whatever a damaged file put into it."""

    def __init__(self, message: str = "") -> None:
        super().__init__(escape_terminal(message))


class VocabularyError(PemaError, ValueError):
    """Token ids that cannot be a vocabulary, or a vocabulary that does not fit the model."""


class SurgeryError(PemaError, ValueError):
    """A model whose embedding cannot be shrunk, restored or saved as asked."""


class UnseenTokenError(PemaError, ValueError):
    """A token outside the partial vocabulary, where that is not allowed."""


class TokenRangeError(PemaError, IndexError):
    """A token id that no row of the embedding matrix can have (negative, or V and above)."""


class FormatError(PemaError, ValueError):
    """A file on disk that is missing, damaged or not what its name promises."""


class InputChangedError(FormatError):
    """A base or delta that was replaced, rewritten or cut short while it was read."""


class BaseMismatchError(PemaError, ValueError):
    """A delta that was trained on another base than the one given."""


class MergeError(PemaError, RuntimeError):
    """A merge that is refused or that failed; nothing was left half-written."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system says against reading `path` becomes a `FormatError` that names it."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {str(error.strerror or error).lower()}") from None
