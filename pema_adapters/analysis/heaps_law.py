"""How a vocabulary grows with the text: Heaps' law, and a figure of it (the paper's figure 2).

    found = scan_text(data, encoder, vocab_size=V)
    heaps_law(found.growth)                       # HeapsLaw(factor=12.3, exponent=0.61): K = 12.3 n^0.61
    drawn("png", [Curve("bert", found.growth, V)])

Figures need matplotlib, the extra `plot`.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError, PemaError
from pema_adapters.io.atomic_write import check_replaceable

Points = Sequence[tuple[int, int]]

FITTED_SPAN = 3  # the law is fitted to the last third of the curve's tokens and more: before, it is steeper
"""Extrapolated from half of a text to all of it, K is 10% too high in the median (GLUE, three tokenizers); about
65% with 1,000 tokens."""


@dataclass(frozen=True)
class HeapsLaw:
    """K = factor * n ** exponent for n tokens. It knows no V, so it is for what lies well below V."""

    factor: float
    exponent: float

    def __call__(self, tokens: float) -> float:
        """K after so many tokens."""
        return float(self.factor * tokens**self.exponent)


@dataclass(frozen=True)
class Curve:
    """What one tokenizer makes of a text: its name, points (tokens, distinct ids), and V."""

    name: str
    points: Points
    vocab_size: int


def fit_heaps_law(points: Points) -> HeapsLaw | None:
    """Fit the end of a curve of points (tokens, distinct ids): least squares of logarithms; None for one point."""
    fitted = _select_tail(points)
    if len(fitted) < 2:
        return None
    tokens, distinct = np.log(np.array(fitted, dtype=np.float64)).T
    exponent, log_factor = np.polyfit(tokens, distinct, deg=1)
    return HeapsLaw(float(np.exp(log_factor)), float(exponent))


def _select_tail(points: Points) -> Points:
    fitted = [point for point in points if point[0] * FITTED_SPAN >= points[-1][0]]
    return fitted if len(fitted) > 1 else points[-2:]


def check_figure_path(path: str) -> str:
    """The format of a figure at `path`, e.g. "png". Refuses what cannot be written, before any work is done.

    Raises:
        PemaError: matplotlib is not installed.
        FormatError: a suffix that matplotlib has no format for, or nothing can be written there.
    """
    found = parse_figure_format(path)
    check_replaceable(Path(path))
    return found


def parse_figure_format(path: str) -> str:
    """The same by the name alone, of a figure whose folder is still to come."""
    formats = _create_figure().canvas.get_supported_filetypes()
    kind = Path(path).suffix[1:].lower()
    if kind not in formats:
        found = Path(path).suffix or "no suffix"
        raise FormatError(f"{path}: found {found}, expected one of {', '.join('.' + name for name in sorted(formats))}")
    return kind


def render_figure(kind: str, curves: Iterable[Curve]) -> bytes:
    """A figure as a file of a format: distinct against all tokens, Heaps' law dashed and V dotted, for each curve."""
    figure, content = _create_figure(), io.BytesIO()
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="tokens", ylabel="distinct tokens")
    for number, curve in enumerate(curves):
        _plot_curve(axes, curve, f"C{number}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)  # beside the curves
    figure.savefig(content, format=kind, dpi=150)
    return content.getvalue()


def _plot_curve(axes: Any, curve: Curve, color: str) -> None:
    tokens, distinct = zip(*curve.points, strict=True) if curve.points else ((), ())
    axes.plot(tokens, distinct, color=color, marker=".", label=_escape_label(Path(curve.name).name or curve.name))
    law = fit_heaps_law(curve.points)
    if law is not None:
        label = f"Heaps' law, K = {law.factor:.3g} n^{law.exponent:.3f}"
        ends = [point[0] for point in _select_tail(curve.points)]
        axes.plot(ends, [law(n) for n in ends], color=color, linestyle="--", label=label)
    axes.axhline(curve.vocab_size, color=color, linestyle=":", label=f"V = {curve.vocab_size:,}")


def _escape_label(name: str) -> str:
    """Without a meaning to matplotlib, which leaves out names that begin with _ and reads $ as mathematics."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def _create_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PemaError(
            f"a figure needs matplotlib ({error}): pip install 'pema-adapters[plot]', or go without --plot"
        ) from error
    return Figure(figsize=(7, 4.5), layout="constrained")
