"""Retry policy for Hub requests, for the failures that its client does not retry itself."""

import time
from collections.abc import Callable
from typing import TypeVar

from pema_adapters.hub.errors import get_status, iterate_causes

T = TypeVar("T")

TRIES = 4
MAX_DELAY = 300.0
"""Seconds."""
_TRUNCATED = ("ChunkedEncodingError", "RemoteProtocolError")
"""What requests and httpx raise on a truncated answer."""
_sleep = time.sleep


def with_retry(request: Callable[[], T]) -> T:
    """Send a request, again if the Hub was busy or its answer was cut off.

    Args:
        request: An idempotent request, tried up to `TRIES` times, after the delay that the Hub asks for.

    Raises:
        Exception: What the last try raised.
    """
    for _ in range(TRIES - 1):
        try:
            return request()
        except Exception as error:  # httpx's errors have no built-in base class in common
            wait = _retry_delay(error)
            if wait is None:
                raise
        _sleep(wait)
    return request()


def _retry_delay(error: BaseException) -> float | None:
    """Return the seconds to wait before another try, None if it will not help."""
    for cause in iterate_causes(error):
        if type(cause).__name__ in _TRUNCATED:
            return 1.0
        if get_status(cause) == 429:
            named = str(cause.response.headers.get("Retry-After", ""))  # type: ignore[attr-defined]
            return min(float(named), MAX_DELAY) if named.isdecimal() else 30.0
    return None
