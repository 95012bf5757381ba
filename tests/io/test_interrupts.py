"""Signals that arrive in a finalizer, where Python prints exceptions and drops them."""

import signal
import time
from contextlib import suppress

import pytest

from pema_adapters.io.interrupts import Terminated, raise_on_signals


class Direct:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


class Nested(Direct):
    def __del__(self):
        with suppress(OSError):
            self.close()

    def close(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("kind", [Direct, Nested])
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_in_a_finalizer_is_raised_a_moment_later(kind, number, expected):
    """A dropped exception would fail this test as a PytestUnraisableExceptionWarning."""
    finalized = False
    with pytest.raises(expected), raise_on_signals():
        item = kind(number)
        del item
        finalized = True
        for _ in range(500):
            time.sleep(0.01)
    assert finalized
