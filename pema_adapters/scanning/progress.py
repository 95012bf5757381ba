"""How far a scan has come: for the eyes of who waits, and for the disk, to go on from after an interruption."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pema_adapters.scanning.bitmap import Bitmap, GrowingBitmap, Grown

SECONDS_BETWEEN_FIGURES = 0.5
SECONDS_BETWEEN_STATES = 0.2  # a state is a copy of the bitmap: rarely enough to cost nothing


@dataclass(frozen=True)
class State:
    """A scan between two steps: the number of its split, the steps and rows that are done, what was seen, and where."""

    split: int
    steps: int
    rows: int
    grown: Grown
    columns: tuple[str, ...] = ()


class Keeper(Protocol):
    """Keeps the last state of a scan, to go on from."""

    def keep(self, state: State) -> None:
        """Take a state over."""


@dataclass
class Steps:
    """Told after every step of a scan: a batch of text, a piece of a column, a row. They are the same each time."""

    bitmap: Bitmap
    bar: Any = None
    keeper: Keeper | None = None
    columns: Iterable[str] = ()  # that were found so far
    split: int = 0
    number: int = 0  # steps of the split, skipped or done
    rows: int = 0
    _skipped: int = 0  # steps of the split that were done before
    _began: float = field(default_factory=time.monotonic)
    _tokens_before: int = 0
    _shown: float = 0.0
    _kept: float = 0.0

    def wake(self, state: State, bitmap: GrowingBitmap) -> None:
        """Go on from a state; `begin` its split next."""
        bitmap.wake(state.grown)
        self.split, self.rows, self._skipped, self._tokens_before = state.split, state.rows, state.steps, bitmap.tokens
        if self.bar is not None:
            self.bar.update(state.rows)

    def begin(self, split: int) -> int:
        """At the start of each split, in order: the number of its steps to skip."""
        if split != self.split:
            self._skipped = 0
        self.split, self.number = split, 0
        return self._skipped

    def skips(self) -> bool:
        """Before a step: whether it was done before. If so, it counts as done."""
        if self.number >= self._skipped:
            return False
        self.number += 1
        return True

    def done(self, rows: int, steps: int = 1) -> None:
        """After steps over so many rows."""
        self.number += steps
        self.rows += rows
        now = time.monotonic()
        if self.bar is not None:
            self._show(rows, now)
        if self.keeper is not None and now - self._kept >= SECONDS_BETWEEN_STATES:
            self._kept = now
            self._keep(self.keeper)

    def end(self) -> None:
        """After the last step."""
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(self.figures(time.monotonic()), refresh=False)

    def _keep(self, keeper: Keeper) -> None:
        if isinstance(self.bitmap, GrowingBitmap):
            keeper.keep(State(self.split, self.number, self.rows, self.bitmap.at_rest(), tuple(self.columns)))

    def _show(self, rows: int, now: float) -> None:
        if not self.bar.disable and now - self._shown >= SECONDS_BETWEEN_FIGURES:
            self._shown = now
            self.bar.set_postfix_str(self.figures(now), refresh=False)
        self.bar.update(rows)

    def figures(self, now: float) -> str:
        """Tokens a second, without those of before an interruption, and K so far."""
        rate = (self.bitmap.tokens - self._tokens_before) / max(now - self._began, 1e-9)
        return f"{_short(rate)} tokens/s, K = {self.bitmap.distinct():,}"


def _short(rate: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.1f}{unit}"
    return f"{rate:.0f}"
