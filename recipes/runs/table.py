"""Results as a table: a row for each method with and without PEMA, a column for each task."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from _tasks import Task

Result = dict[str, Any]


def report(results: Sequence[Result], tasks: Sequence[Task]) -> str:
    """A row for each method with and without PEMA: the first metric of each task, and the costs over all tasks."""
    heads = [f"{task.name} {task.metrics[0]}" for task in tasks]
    rows = [["method", "PEMA", *heads, "trained", "peak MB", "s/step"]]
    for (method, pema), group in grouped(results, by=("method", "pema")).items():
        cells = [mean_and_spread(headlines(group, task)) for task in tasks]
        rows.append([method, pema, *cells, *costs(group)])
    seeds = {result["setting"]["seed"] for result in results}
    caption = f"{results[0]['setting']['base']}: mean and standard deviation of {len(seeds)} seeds, in points\n\n"
    return caption + aligned(rows)


def headlines(results: Iterable[Result], task: Task) -> list[float]:
    """The first metric of the first scored split, of the runs of one task."""
    mine = [result["scores"] for result in results if result["task"] == task.name]
    return [next(iter(scores.values()))[task.metrics[0]] for scores in mine]


def costs(results: Sequence[Result]) -> list[str]:
    """Means over the tasks; of seconds, the median of the runs' medians."""
    trained = statistics.fmean(result["trained_parameters"] for result in results)
    peak = statistics.fmean(result["peak_bytes"] for result in results)
    seconds = statistics.median(result["seconds_per_step"] for result in results)
    return [f"{trained:,.0f}", f"{peak / 1e6:,.0f}", f"{seconds:.3f}"]


def mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def grouped(results: Iterable[Result], by: Sequence[str]) -> dict[tuple[Any, ...], list[Result]]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result["setting"][name] for name in by), []).append(result)
    return groups


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)
