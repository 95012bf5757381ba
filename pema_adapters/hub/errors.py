"""Translate every error of the Hub's client to one line: what went wrong, and what to do.

Errors are recognized by the names of their classes and by HTTP status: huggingface_hub raises errors of requests before
version 1 and of httpx since, and neither library is imported here.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Use = Literal["download", "push"]
MAX_REASON = 200
"""Characters of an error's own text."""
_OFFLINE = "{said}), and the local cache has no complete copy; download it once with a network, or give a folder"
_HIDDEN = "not found, or private); check the name, or log in (hf auth login)"
_LOG_IN = "no token, or one that the Hub rejects); log in (hf auth login), or give --token"
_REFUSED = "{said}); the Hub rejects the token: log in (hf auth login), or check HF_TOKEN"
_AGAIN = "{said}); check the network and run again, what is uploaded is not sent again"
_NAME = "{said}); check the name"
_LOOP = "it redirects without end); check HF_ENDPOINT and the proxy"
_ANSWER = "its answer is not one of the Hub's: {said}); check HF_ENDPOINT, or try again later"
_DISK = "{said}); free some space, or choose another cache with HF_HOME"


@dataclass(frozen=True)
class _Row:
    """The lines for errors of these classes ("": any) and statuses ((): any); `{said}` is the error's own text."""

    classes: str
    statuses: tuple[int, ...]
    download: str
    push: str

    def matches(self, error: BaseException) -> bool:
        names = {kind.__name__ for kind in type(error).__mro__}
        return (not self.classes or bool(names & set(self.classes.split()))) and (
            not self.statuses or get_status(error) in self.statuses
        )


_MAP = (
    _Row("GatedRepoError", (), *2 * ("it is gated); ask for access on its page there and log in (hf auth login)",)),
    _Row("RepositoryNotFoundError", (401,), _HIDDEN, _LOG_IN),
    _Row("RepositoryNotFoundError", (), _HIDDEN,
         "no such repository, or the token has no access to it); check the name, or log in (hf auth login, --token)"),
    _Row("RevisionNotFoundError", (), *2 * ("no revision {revision!r}); give a branch, tag or commit of it",)),
    _Row("LocalEntryNotFoundError", (), _OFFLINE, _AGAIN),
    _Row("LocalTokenNotFoundError", (), *2 * ("no token); log in (hf auth login), or set HF_TOKEN",)),
    _Row("HFValidationError", (), _NAME, _NAME),
    _Row("TooManyRedirects RecursionError", (), _LOOP, _LOOP),
    _Row("JSONDecodeError FileMetadataError", (), _ANSWER, _ANSWER),
    _Row("", (401,), _REFUSED, _LOG_IN),
    _Row("", (403,), _REFUSED,
         "{said}); give a token that may write there (hf auth login, --token), or free some quota"),
    _Row("", (409, 412), "{said}); try again later", "another push is in progress); run again when it has ended"),
    _Row("", (413,), "{said}); try again later", "{said}); it is too large for the Hub"),
    _Row("", (429,), "{said}); try again later",
         "{said}); too many requests: run again later, what is uploaded is not sent again"),
    _Row("HfHubHTTPError HTTPStatusError", (), "{said}); try again later", _AGAIN),
)  # fmt: skip
"""In order: the first row that matches counts, so the most specific come first."""
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
_MALFORMED_ANSWER = (TypeError, KeyError, IndexError, AttributeError, UnicodeError)
"""What the client raises on an answer of an unexpected form."""


def explain(error: BaseException, use: Use, revision: str | None = None) -> str:
    """Return what went wrong and what to do, as `(reason); advice`, without the token that was sent.

    Args:
        error: The error of the client.
        use: What was being done.
        revision: The requested revision.
    """
    found, text = _find_row(error, use)
    return "(" + text.format(said=_describe(found), revision=revision)


def _find_row(error: BaseException, use: Use) -> tuple[BaseException, str]:
    """Return the most telling error of the chain, and its line."""
    chain = list(iterate_causes(error))
    for cause in chain:
        for row in _MAP:
            if row.matches(cause):
                return cause, getattr(row, use)
    if isinstance(error, _MALFORMED_ANSWER):
        return error, _ANSWER
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            return cause, _DISK
    return (chain[-1], _AGAIN) if use == "push" else (error, _OFFLINE)


def iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, its cause, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def get_status(error: BaseException) -> int | None:
    """Return the HTTP status of the answer that an error is about, None without an answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_unreachable(error: BaseException) -> bool:
    """Return whether the Hub did not answer or is out of order, rather than refusing the request."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "LocalEntryNotFoundError" in names:
        return True
    if names & {"HfHubHTTPError", "HTTPStatusError"}:
        status = get_status(error) or 0
        return status == 429 or status >= 500
    return not names & {"HFValidationError", "LocalTokenNotFoundError"}


def is_conflict(error: BaseException) -> bool:
    """Return whether a commit was refused because another one came first.

    The Hub answers 412 if the branch has moved on from the parent commit, 409 if two commits collide, and 404 if a file
    to be deleted is gone.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return get_status(error) in (409, 412) or "EntryNotFoundError" in names


def _describe(error: BaseException) -> str:
    """Return an error's own text in one line: the innermost cause of a failed connection, or the Hub's answer."""
    inner: object = error
    while isinstance(inner, Exception):
        error, inner = inner, getattr(inner, "reason", None) or (inner.args[0] if inner.args else None)
    text = " ".join((inner if isinstance(inner, str) else str(error)).split()).split(" for url")[0]
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    text = text if said in text else f"{text}: {said}"
    return _redact_token(text or type(error).__name__, error)[:MAX_REASON]


def _redact_token(text: str, error: BaseException) -> str:
    """Remove the token of the request, which a server may echo."""
    try:
        request = error.response.request if getattr(error, "response", None) is not None else error.request  # type: ignore[attr-defined]
        token = str(request.headers["authorization"]).removeprefix("Bearer ")
    except (AttributeError, KeyError, RuntimeError, TypeError):  # RuntimeError: httpx, if an error has no request
        return text
    return text.replace(token, "...") if token else text
