"""Results as a table: a row for each method with and without PEMA, a column for each task."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from harness.tables import format_table

Result = dict[str, Any]


def render(figures: dict[str, Any]) -> str:
    return report(figures["runs"])


def report(results: Sequence[Result]) -> str:
    """Format a row for each method with and without PEMA: the first metric of each task, and costs over all tasks."""
    tasks = {result["task"]: first_metric(result) for result in results}
    rows = []
    for (method, pema), group in group_by(results, ("method", "pema")).items():
        cells = [mean_and_spread(headlines(group, task)) for task in tasks]
        rows.append([method, pema, *cells, *costs(group)])
    seeds = {result["setting"]["seed"] for result in results}
    caption = f"{results[0]['setting']['base']}: mean and standard deviation of {len(seeds)} seeds, in points\n\n"
    header = ["method", "PEMA", *(f"{task} {metric}" for task, metric in tasks.items()), "trained", "peak MB", "s/step"]
    return caption + format_table(header, rows)


def first_metric(result: Result) -> str:
    """Return the name of the first metric of the first scored split."""
    return str(next(iter(next(iter(result["scores"].values())))))


def headline(result: Result) -> float:
    """Return the first metric of the first scored split."""
    return float(next(iter(next(iter(result["scores"].values())).values())))


def headlines(results: Iterable[Result], task: str) -> list[float]:
    """Return the headline of each run of one task."""
    return [headline(result) for result in results if result["task"] == task]


def costs(results: Sequence[Result]) -> list[str]:
    """Format means over the tasks; of seconds, the median of the runs' medians."""
    trained = statistics.fmean(result["trained_parameters"] for result in results)
    peak = statistics.fmean(result["peak_bytes"] for result in results)
    seconds = statistics.median(result["seconds_per_step"] for result in results)
    return [f"{trained:,.0f}", f"{peak / 1e6:,.0f}", f"{seconds:.3f}"]


def mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def group_by(results: Iterable[Result], names: Sequence[str]) -> dict[tuple[Any, ...], list[Result]]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result["setting"][name] for name in names), []).append(result)
    return groups
