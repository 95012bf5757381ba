"""Paired timing: contestants take turns within one run, because seconds depend on the machine and ratios travel.

times = time_paired({"bitmap": bitmap, "scan": scan}, rounds=7)
format_ratio(round_ratios(times, "scan", "bitmap"))              # "0.66 (0.63 to 0.71)"
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Times = Mapping[Any, Sequence[float]]
"""Seconds of each contestant in each round."""


def rotate(items: Sequence[Item], rounds: int) -> Iterator[list[Item]]:
    """Yield the items once a round, each round beginning with another."""
    for number in range(rounds):
        first = number % len(items)
        yield [*items[first:], *items[:first]]


def time_paired(contestants: Mapping[str, Callable[[], Any]], *, rounds: int = 5) -> dict[str, list[float]]:
    """Return the seconds of each contestant in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number, order in enumerate(rotate(list(contestants), rounds + 1)):
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def round_ratios(times: Times, name: Any, reference: Any) -> list[float]:
    """Return name / reference of each round."""
    return [one / other for one, other in zip(times[name], times[reference], strict=True)]


def format_ratio(ratios: Sequence[float], *, floor: bool = False) -> str:
    """Format a ratio as its median and, in parentheses, the least and the greatest of all rounds.

    Args:
        ratios: one a round.
        floor: the reference does less work than the contestant, so that a median under 1 is noise, and is called so.
    """
    median = statistics.median(ratios)
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else " (one round)"
    return f"{median:.2f}{spread}{', noise' if floor and median < 1 else ''}"
