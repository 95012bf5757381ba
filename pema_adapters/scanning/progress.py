"""How far a scan has come: for the eyes of who waits, and for the disk, to go on from after an interruption."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from pema_adapters.io.progress import ProgressBar
from pema_adapters.scanning.bitmap import Bitmap, GrowingBitmap, Grown

SECONDS_BEFORE_BAR = 1.0
SECONDS_BETWEEN_FIGURES = 0.5
SECONDS_BETWEEN_STATES = 0.2  # a state is a copy of the bitmap: rarely enough to cost nothing


def open_scan_bar(total: int | None, progress: bool | None) -> ProgressBar:
    """Open the bar of a scan: it appears after a second, and never if the Hub's progress bars are disabled."""
    is_disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}
    shown = False if is_disabled else progress
    return ProgressBar("scanning", total, shown, unit=" rows", delay=SECONDS_BEFORE_BAR)


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
    bar: ProgressBar | None = None
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
            self.bar.advance(state.rows)

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
            self._show(self.bar, rows, now)
        if self.keeper is not None and now - self._kept >= SECONDS_BETWEEN_STATES:
            self._kept = now
            self._keep(self.keeper)

    def end(self) -> None:
        """After the last step."""
        if self.bar is not None and self.bar.is_shown:
            self.bar.set_status(self.figures(time.monotonic()))

    def _keep(self, keeper: Keeper) -> None:
        if isinstance(self.bitmap, GrowingBitmap):
            keeper.keep(State(self.split, self.number, self.rows, self.bitmap.at_rest(), tuple(self.columns)))

    def _show(self, bar: ProgressBar, rows: int, now: float) -> None:
        if bar.is_shown and now - self._shown >= SECONDS_BETWEEN_FIGURES:
            self._shown = now
            bar.set_status(self.figures(now))
        bar.advance(rows)

    def figures(self, now: float) -> str:
        """Tokens a second, without those of before an interruption, and K so far."""
        rate = (self.bitmap.tokens - self._tokens_before) / max(now - self._began, 1e-9)
        return f"{_short(rate)} tokens/s, K = {self.bitmap.distinct():,}"


def _short(rate: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.1f}{unit}"
    return f"{rate:.0f}"
