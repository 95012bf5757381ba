"""Signal handling: SIGTERM as an exception, and Ctrl-C and SIGTERM deferred while files are renamed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where a KeyboardInterrupt would be, so that the same code cleans up."""


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM during the block, so that clean-up code runs before the process ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block has ended.

    Signals are handled by the main thread alone; in another thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    for number in SIGNALS:
        if signal.getsignal(number) is not None:  # None: installed by another language, and not to be put back
            previous[number] = signal.signal(number, lambda found, frame: pending.append(found))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for found in pending:
            signal.raise_signal(found)
