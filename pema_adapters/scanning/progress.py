"""Progress of a scan: the progress bar, and the state from which an interrupted scan resumes."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from pema_adapters.io.progress import ProgressBar
from pema_adapters.scanning.bitmap import Bitmap, BitmapState, GrowingBitmap

SECONDS_BEFORE_BAR = 1.0
SECONDS_BETWEEN_STATUSES = 0.5
SECONDS_BETWEEN_STATES = 0.2  # a state copies the bitmap; at this rate the cost is negligible


def open_scan_bar(total: int | None, progress: bool | None) -> ProgressBar:
    """Open the bar of a scan: it appears after a second, and never if the Hub's progress bars are disabled."""
    is_disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}
    shown = False if is_disabled else progress
    return ProgressBar("scanning", total, shown, unit=" rows", delay=SECONDS_BEFORE_BAR)


@dataclass(frozen=True)
class ScanState:
    """A scan between two steps.

    Attributes:
        split: the number of the current split.
        steps: the steps of that split that are done.
        rows: the rows of all splits that are done.
        bitmap: the ids seen.
        columns: the columns found so far.
    """

    split: int
    steps: int
    rows: int
    bitmap: BitmapState
    columns: tuple[str, ...] = ()


class Checkpointer(Protocol):
    """Keeps the last state of a scan."""

    def save_state(self, state: ScanState) -> None:
        """Replace the state that is kept."""


@dataclass
class ScanProgress:
    """Counts the steps of a scan, updates its bar, and saves its state.

    A step is a batch of text, a slice of a column, or a row; the same data give the same steps every time.

    Args:
        bitmap: where the scan marks ids.
        bar: the progress bar.
        checkpointer: keeps the state of the scan.
        columns: the columns found so far; the scan adds to it.
    """

    bitmap: Bitmap
    bar: ProgressBar | None = None
    checkpointer: Checkpointer | None = None
    columns: Iterable[str] = ()
    split: int = 0
    step: int = 0  # steps of the split, skipped or done
    rows: int = 0
    _steps_to_skip: int = 0  # steps of the split that an interrupted scan has done
    _start_time: float = field(default_factory=time.monotonic)
    _tokens_before: int = 0
    _last_status: float = 0.0
    _last_save: float = 0.0

    def restore(self, state: ScanState, bitmap: GrowingBitmap) -> None:
        """Continue from a state. Call `start_split` with its split next."""
        bitmap.restore(state.bitmap)
        self.split, self.rows, self._steps_to_skip = state.split, state.rows, state.steps
        self._tokens_before = bitmap.tokens
        if self.bar is not None:
            self.bar.advance(state.rows)

    def start_split(self, split: int) -> int:
        """Start a split, in order; return the number of its steps to skip."""
        if split != self.split:
            self._steps_to_skip = 0
        self.split, self.step = split, 0
        return self._steps_to_skip

    def skip_step(self) -> bool:
        """Return True, and count the next step, if an interrupted scan has done it."""
        if self.step >= self._steps_to_skip:
            return False
        self.step += 1
        return True

    def advance(self, rows: int, steps: int = 1) -> None:
        """Count finished steps and their rows; update the bar and save the state when due."""
        self.step += steps
        self.rows += rows
        now = time.monotonic()
        if self.bar is not None:
            self._update_bar(self.bar, rows, now)
        if self.checkpointer is not None and now - self._last_save >= SECONDS_BETWEEN_STATES:
            self._last_save = now
            self._save_state(self.checkpointer)

    def finish(self) -> None:
        """Show the final status."""
        if self.bar is not None and self.bar.is_shown:
            self.bar.set_status(self.format_status(time.monotonic()))

    def format_status(self, now: float) -> str:
        """Format tokens per second since the start or the resumption, and K so far."""
        rate = (self.bitmap.tokens - self._tokens_before) / max(now - self._start_time, 1e-9)
        return f"{_format_rate(rate)} tokens/s, K = {self.bitmap.count_distinct():,}"

    def _save_state(self, checkpointer: Checkpointer) -> None:
        if isinstance(self.bitmap, GrowingBitmap):
            bitmap = self.bitmap.snapshot()
            checkpointer.save_state(ScanState(self.split, self.step, self.rows, bitmap, tuple(self.columns)))

    def _update_bar(self, bar: ProgressBar, rows: int, now: float) -> None:
        if bar.is_shown and now - self._last_status >= SECONDS_BETWEEN_STATUSES:
            self._last_status = now
            bar.set_status(self.format_status(now))
        bar.advance(rows)


def _format_rate(rate: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= size:
            return f"{rate / size:.1f}{unit}"
    return f"{rate:.0f}"
