"""The progress bar of merging, pushing and scanning: the one place that uses tqdm."""

import sys
from collections.abc import Callable

Advance = Callable[[int], None]
"""`advance(n)` is called after each write or read, with the number of bytes done."""


class ProgressBar:
    """A bar on standard error, used as a context manager. A hidden bar imports nothing and starts no thread.

    Args:
        label: The text before the bar, "merging" for example.
        total: What the bar counts up to, in `unit`; None if unknown.
        shown: True or False to show or hide the bar; None to show it on a terminal only.
        unit: "B" for bytes, which are shown in KiB, MiB and so on, or the name of what is counted.
        delay: Seconds before the bar appears, so that short work shows none.

    Attributes:
        is_shown: Whether anything will be printed.
    """

    def __init__(
        self, label: str, total: int | None, shown: bool | None, *, unit: str = "B", delay: float = 0.0
    ) -> None:
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.is_shown = on_terminal if shown is None else shown
        if self.is_shown:
            from tqdm import tqdm

            divisor = 1024 if unit == "B" else 1000
            options = {"unit": unit, "unit_scale": True, "unit_divisor": divisor, "delay": delay}
            self._bar = tqdm(total=total, desc=label, **options)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_shown:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Move the bar forward by `count` units."""
        if self.is_shown:
            self._bar.update(count)

    def set_status(self, text: str) -> None:
        """Show `text` after the bar, from the next refresh on."""
        if self.is_shown:
            self._bar.set_postfix_str(text, refresh=False)
