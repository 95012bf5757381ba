"""Requests to the Hub that are asked again: its client itself repeats some, but not those that this is for."""

import time
from collections.abc import Callable
from typing import TypeVar

from pema_adapters.hub.errors import get_status, iterate_causes

T = TypeVar("T")

TRIES = 4
MAX_DELAY = 300.0
"""Seconds."""
_TRUNCATED = ("ChunkedEncodingError", "RemoteProtocolError")
"""What requests and httpx raise where an answer ends too early."""
_sleep = time.sleep


def with_retry(request: Callable[[], T]) -> T:
    """Send a request, again if the Hub was busy or its answer was cut off.

    What it asks for must be the same when it is asked for twice. Raises what the last try raised.
    """
    for _ in range(TRIES - 1):
        try:
            return request()
        except Exception as error:  # httpx's errors have no built-in kind in common
            wait = _retry_delay(error)
            if wait is None:
                raise
        _sleep(wait)
    return request()


def _retry_delay(error: BaseException) -> float | None:
    """Seconds after which another try may do better; None where it will not."""
    for cause in iterate_causes(error):
        if type(cause).__name__ in _TRUNCATED:
            return 1.0
        if get_status(cause) == 429:
            named = str(cause.response.headers.get("Retry-After", ""))  # type: ignore[attr-defined]
            return min(float(named), MAX_DELAY) if named.isdecimal() else 30.0
    return None
