"""Inject faults into requests, and log the requests."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

from .answers import Answer, Refusal

LOGGED = ("authorization", "range", "user-agent", "content-type")


@dataclass
class Request:
    """One request in the log: its unquoted path without query, and the bytes of the bodies sent and received so far."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    """None if the connection was cut before an answer."""
    sent: int = 0
    received: int = 0
    repo: str | None = None
    file: str | None = None
    """The requested file of `repo`."""

    @classmethod
    def of(cls, method: str, target: str, headers: dict[str, str]) -> "Request":
        kept = {name.lower(): value for name, value in headers.items() if name.lower() in LOGGED}
        return cls(method, unquote(target.split("?", maxsplit=1)[0]), kept)

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """A fault to inject into requests whose "METHOD /path" matches the pattern.

    With `after_bytes` the connection is cut after so many bytes of the body: of the answer to a GET, of what is
    received by a PUT or POST. With `before` that is called, and the request answered as ever. With `json` that is
    answered, whatever its form, or with `status` an error.
    """

    match: str
    status: int | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int | None = None
    code: str | None = None
    message: str = "a fault that a test asked for"
    before: Callable[[], object] | None = None
    json: object = None
    skip: int = 0
    """How many matching requests pass first."""

    def __post_init__(self) -> None:
        if sum(one is not None for one in (self.status, self.after_bytes, self.before, self.json)) != 1:
            raise ValueError("a fault has one of status, after_bytes, before and json")

    def answer(self) -> Answer | None:
        """Return the answer to give instead of the usual one, None for the usual one."""
        if self.before:
            self.before()
        return None if self.json is None else Answer.of(self.json, **self.headers)

    @property
    def refusal(self) -> Refusal:
        assert self.status is not None
        refusal = Refusal(self.status, self.message, self.code)
        refusal.answer.headers.update(self.headers)
        return refusal


class Faults:
    """The queue of faults to inject."""

    def __init__(self) -> None:
        self._queue: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._queue.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._queue.clear()

    def take(self, request: Request) -> Fault | None:
        """Take the fault for this request off the queue."""
        with self._lock:
            fault = next((one for one in self._queue if re.search(one.match, str(request))), None)
            if fault is None or fault.skip:
                if fault:
                    fault.skip -= 1
                return None
            fault.times -= 1
            if not fault.times:
                self._queue.remove(fault)
            return fault
