"""Signal handling: SIGTERM as an exception; Ctrl-C and SIGTERM deferred while files are renamed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

RETRY_SECONDS = 0.01
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM; a KeyboardInterrupt, so that the same code cleans up."""


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and KeyboardInterrupt on SIGINT during the block, so that cleanup code runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _raise) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    """Raise the exception for a signal; in a finalizer, where Python drops exceptions, a moment later."""
    if _is_in_finalizer(frame):
        threading.Timer(RETRY_SECONDS, signal.raise_signal, (number,)).start()
        return
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _is_in_finalizer(frame: FrameType | None) -> bool:
    """Whether the frame, or one that called it, is a `__del__`."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the end of the block.

    Only the main thread handles signals: in any other thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    previous: dict[signal.Signals, Any] = {}
    for number in SIGNALS:
        if signal.getsignal(number) is not None:  # None: installed by C code, and cannot be restored
            previous[number] = signal.signal(number, lambda found, frame: pending.append(found))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for found in pending:
            signal.raise_signal(found)
