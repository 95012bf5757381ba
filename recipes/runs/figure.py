"""Scores against memory, with and without PEMA, as a figure. Needs matplotlib."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from runs.table import headline

FILLED = {"off": "none", "on": "full", "frozen": "left"}
"""Fill of a marker, by `--pema`."""


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot a point for each method with and without PEMA: peak memory, and the mean score over the tasks.

    Bars are the standard deviation over the seeds; an arrow leads from training without PEMA to training with it.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="peak memory of training (MB)", ylabel="mean score of the tasks (points)")
    methods = list(dict.fromkeys(result["setting"]["method"] for result in results))
    for number, method in enumerate(methods):
        points = {pema: point(results, method, pema) for pema in FILLED}
        _draw_method(axes, method, {pema: found for pema, found in points.items() if found}, f"C{number}")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def point(results: Sequence[dict[str, Any]], method: str, pema: str) -> tuple[float, float, float] | None:
    """Return MB, the mean score in points, and its standard deviation over the seeds; None without such results."""
    mine = [one for one in results if (one["setting"]["method"], one["setting"]["pema"]) == (method, pema)]
    if not mine:
        return None
    seeds = sorted({one["setting"]["seed"] for one in mine})
    means = [statistics.fmean(100 * headline(one) for one in mine if one["setting"]["seed"] == seed) for seed in seeds]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return statistics.fmean(one["peak_bytes"] / 1e6 for one in mine), statistics.fmean(means), spread


def _draw_method(axes: Any, method: str, points: dict[str, tuple[float, float, float]], color: str) -> None:
    for pema, (megabytes, score, spread) in points.items():
        style = {"marker": "o", "markersize": 9, "color": color, "fillstyle": FILLED[pema], "capsize": 3}
        label = method if pema == "off" else f"{method}, PEMA{' frozen' if pema == 'frozen' else ''}"
        axes.errorbar(megabytes, score, yerr=spread, linestyle="none", label=label, **style)
    if "off" in points and "on" in points:
        arrow = {"arrowstyle": "->", "color": color, "alpha": 0.6}
        axes.annotate("", points["on"][:2], points["off"][:2], arrowprops=arrow)
