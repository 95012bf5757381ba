"""Requests to the Hub that are asked again: its client itself repeats some, but not those that this is for."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

TRIES = 4
LONGEST_WAIT = 300.0
"""Seconds."""
_sleep = time.sleep


def patiently(ask: Callable[[], T]) -> T:
    """`ask()`, repeated where the Hub had too many requests (after the time that it names) or the answer was cut off.

    What it asks for must be the same when it is asked for twice. Raises what the last try raised.
    """
    for _ in range(TRIES - 1):
        try:
            return ask()
        except (OSError, RuntimeError) as error:  # the client's own errors are among them
            wait = _worth_waiting(error)
            if wait is None:
                raise
        _sleep(wait)
    return ask()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _worth_waiting(error: BaseException) -> float | None:
    """Seconds after which another try may do better; None where it will not."""
    from requests.exceptions import ChunkedEncodingError

    for cause in causes(error):
        if isinstance(cause, ChunkedEncodingError):
            return 1.0
        response = getattr(cause, "response", None)
        if response is not None and response.status_code == 429:
            named = response.headers.get("Retry-After", "")
            return min(float(named), LONGEST_WAIT) if named.isdigit() else 30.0
    return None
