"""Fit and plot the growth of a vocabulary with the text: Heaps' law, and the paper's figure 2.

    found = scan_text(data, encoder, vocab_size=V)
    fit_heaps_law(found.growth)     # HeapsLaw(factor=12.3, exponent=0.61): K = 12.3 n^0.61
    render_figure("png", [Curve("bert", found.growth, V)])    # the content of a PNG file

Figures need matplotlib (the extra `plot`).
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

FITTED_SPAN = 3
"""The fit uses the points from a third of the tokens on: curves are steeper before. Extrapolated from half of a text to
all of it, K is 10% too high in the median (GLUE, three tokenizers), and about 65% with 1,000 tokens."""


@dataclass(frozen=True)
class HeapsLaw:
    """K = factor * n ** exponent for n tokens. It ignores V, so it holds only for K well below V."""

    factor: float
    exponent: float

    def __call__(self, tokens: float) -> float:
        """Return K after `tokens` tokens."""
        return float(self.factor * tokens**self.exponent)


@dataclass(frozen=True)
class Curve:
    """The growth of one vocabulary.

    Attributes:
        name: the tokenizer, for the legend.
        points: pairs (tokens, distinct ids among them), increasing.
        vocab_size: V.
    """

    name: str
    points: Points
    vocab_size: int


def fit_heaps_law(points: Points) -> HeapsLaw | None:
    """Fit Heaps' law to the end of a growth curve, by least squares of logarithms.

    Args:
        points: pairs (tokens, distinct ids among them), increasing.

    Returns:
        The law; None for fewer than two points.
    """
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
    """Check that a figure can be written to `path`, before any work is done, and return its format, e.g. "png".

    Raises:
        PemaError: matplotlib is not installed.
        FormatError: matplotlib does not know the suffix, or the path cannot be written.
    """
    figure_format = parse_figure_format(path)
    check_replaceable(Path(path))
    return figure_format


def parse_figure_format(path: str) -> str:
    """Return the format of a figure by its suffix; the folder need not exist.

    Raises:
        PemaError: matplotlib is not installed.
        FormatError: matplotlib does not know the suffix.
    """
    formats = _create_figure().canvas.get_supported_filetypes()
    figure_format = Path(path).suffix[1:].lower()
    if figure_format not in formats:
        found = Path(path).suffix or "no suffix"
        raise FormatError(f"{path}: found {found}, expected one of {', '.join('.' + name for name in sorted(formats))}")
    return figure_format


def render_figure(figure_format: str, curves: Iterable[Curve]) -> bytes:
    """Plot distinct ids against tokens for each curve, with Heaps' law (dashed) and V (dotted).

    Args:
        figure_format: a format of matplotlib, e.g. "png".
        curves: the curves.

    Returns:
        The content of the file.
    """
    figure, content = _create_figure(), io.BytesIO()
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="tokens", ylabel="distinct tokens")
    for number, curve in enumerate(curves):
        _plot_curve(axes, curve, f"C{number}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)  # beside the curves
    figure.savefig(content, format=figure_format, dpi=150)
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
    """Escape a name for matplotlib, which hides labels that begin with _ and reads $ as mathematics."""
    return " " * name.startswith("_") + name.replace("$", r"\$")


def _create_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PemaError(
            f"a figure needs matplotlib ({error}): pip install 'pema-adapters[plot]', or omit --plot"
        ) from error
    return Figure(figsize=(7, 4.5), layout="constrained")
