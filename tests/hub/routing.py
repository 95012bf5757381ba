"""Route requests to the functions that answer them."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from .answers import Account, Answer, Dropped, Refusal, no_repository, no_rights, not_logged_in, wrong_token
from .faults import Request
from .repositories import CHUNK, Repository

if TYPE_CHECKING:
    from .server import Hub

PARTS = {"id": r"[^/]+(?:/[^/]+)?", "path": r".+"}
DATASETS = re.compile("^(/api)?/datasets/")
"""Data set repositories share routes and names with model repositories here."""
ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], Callable[..., Answer]]] = []


def route(methods: str, template: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register a handler, for "GET HEAD" and "/{id}/resolve/{revision}/{path}" for example; parts are unquoted keywords."""
    pattern = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{PARTS.get(m[1], '[^/]+')})", template.replace(".", r"\."))

    def add(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((tuple(methods.split()), re.compile(pattern), function))
        return function

    return add


def answer(call: "Call") -> Answer:
    """Answer a call with the first matching route, in order of registration."""
    for methods, pattern, function in ROUTES:
        found = pattern.fullmatch(call.target)
        if found and call.log.method in methods:
            return function(call, **{name: unquote(part) for name, part in found.groupdict().items()})
    raise Refusal(404, f"this server has no {call.log.method} {call.target}")


class Body:
    """A request body. The connection is dropped after `cut` bytes of it."""

    def __init__(self, stream: BufferedIOBase, length: int, log: Request, cut: int | None) -> None:
        self._stream, self._left, self._log, self._cut = stream, length, log, cut

    def read(self, most: int = -1, *, line: bool = False) -> bytes:
        """Read at most so many bytes, or up to the end of a line."""
        self._drop_if_due()
        rest = self._left if self._cut is None else min(self._left, self._cut - self._log.received)
        size = rest if most < 0 else min(most, rest)
        data = (self._stream.readline if line else self._stream.read)(size)
        self._left -= len(data)
        self._log.received += len(data)
        if len(data) < size and not line:
            raise Dropped
        self._drop_if_due()
        return data

    def _drop_if_due(self) -> None:
        if self._cut is not None and self._log.received >= self._cut:
            raise Dropped

    def chunks(self) -> Iterator[bytes]:
        while chunk := self.read(CHUNK):
            yield chunk

    def lines(self) -> Iterator[bytes]:
        while line := self.read(line=True):
            yield line

    def drain(self) -> None:
        for _ in self.chunks():
            pass


@dataclass
class Call:
    """A request being handled, with its quoted path and its entry in the log."""

    hub: "Hub"
    log: Request
    target: str
    query: dict[str, str]
    body: Body
    content_type: str

    @classmethod
    def of(cls, hub: "Hub", log: Request, url: str, body: Body) -> "Call":
        parts = urlsplit(url)
        target = DATASETS.sub(lambda found: "/api/models/" if found[1] else "/", parts.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        return cls(hub, log, target, query, body, log.headers.get("content-type", ""))

    @property
    def account(self) -> Account | None:
        """The account of the token, None without one; an unknown token is always refused."""
        kind, _, token = self.log.headers.get("authorization", "").partition(" ")
        if not kind:
            return None
        if kind != "Bearer" or token not in self.hub.tokens:
            raise wrong_token()
        return self.hub.tokens[token]

    def json(self) -> Any:
        return json.loads(self.body.read() or b"null")

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.read().decode())

    def readable(self, repo_id: str) -> Repository:
        """Return a repository; private ones of others look like missing ones."""
        account, found = self.account, self.hub.repositories.get(repo_id)
        if found is None or (found.private and not (account and account.owns(repo_id))):
            raise no_repository() if account else not_logged_in()
        return found

    def writable(self, repo_id: str, *, by_pull_request: bool = False) -> Repository:
        """Check the right to write; anyone who can read may open a pull request."""
        found, account = self.readable(repo_id), self.account
        if account is None:
            raise not_logged_in(repository=self.target.startswith("/api/models/"))
        if not account.write:
            raise Refusal(403, "You must use a token with write permission")
        if not by_pull_request and not account.owns(repo_id):
            raise no_rights(repo_id)
        return found
