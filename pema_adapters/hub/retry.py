"""Requests to the Hub that are asked again: its client itself repeats some, but not those that this is for."""

import time
from collections.abc import Callable
from typing import TypeVar

from pema_adapters.hub.errors import causes, status_of

T = TypeVar("T")

TRIES = 4
LONGEST_WAIT = 300.0
"""Seconds."""
_CUT_OFF = ("ChunkedEncodingError", "RemoteProtocolError")
"""What requests and httpx raise where an answer ends too early."""
_sleep = time.sleep


def patiently(ask: Callable[[], T]) -> T:
    """`ask()`, repeated where the Hub had too many requests (after the time that it names) or the answer was cut off.

    What it asks for must be the same when it is asked for twice. Raises what the last try raised.
    """
    for _ in range(TRIES - 1):
        try:
            return ask()
        except Exception as error:  # httpx's errors have no built-in kind in common
            wait = _worth_waiting(error)
            if wait is None:
                raise
        _sleep(wait)
    return ask()


def _worth_waiting(error: BaseException) -> float | None:
    """Seconds after which another try may do better; None where it will not."""
    for cause in causes(error):
        if type(cause).__name__ in _CUT_OFF:
            return 1.0
        if status_of(cause) == 429:
            named = str(cause.response.headers.get("Retry-After", ""))  # type: ignore[attr-defined]
            return min(float(named), LONGEST_WAIT) if named.isdecimal() else 30.0
    return None
