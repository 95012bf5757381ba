"""Growth curves: counting, the fitted law, and the figure."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_adapters.analysis.heaps_law import Curve, HeapsLaw, check_figure_path, fit_heaps_law, render_figure
from pema_adapters.errors import FormatError, PemaError
from pema_adapters.scanning.bitmap import GrowingBitmap
from tests.paths import REPOSITORY

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is the extra `plot`")
POINTS = ((1, 1), (10, 8), (100, 50), (1_000, 300))


@given(st.lists(st.lists(st.integers(-3, 30), max_size=40)))
def test_growth_equals_counting(parts):
    """For any split of the ids between calls, the points are at the same token counts."""
    growing, kept = GrowingBitmap(31), [token_id for part in parts for token_id in part if token_id >= 0]
    for part in parts:
        assert growing.mark(np.array(part, np.int64), skip_negative=True) is None
    counted = [(n, len(set(kept[:n]))) for n, _ in growing.growth]
    due = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 31, 39, 49, 62, 78, 98, 123]
    assert list(growing.growth) == counted
    assert [n for n, _ in counted][: len(due)] == sorted({*(n for n in due if n <= len(kept)), len(kept)} - {0})[:19]


def test_growth_stops_at_the_first_invalid_id():
    growing = GrowingBitmap(9)
    assert growing.mark(np.array([1, 2, 9, 3]), skip_negative=False) == 9
    assert growing.tokens == 2


@given(st.floats(0.5, 30), st.floats(0.2, 1))
def test_exact_powers_are_recovered(factor, exponent):
    law = fit_heaps_law([(n, factor * n**exponent) for n in (10, 100, 1_000, 10_000)])
    assert (law.factor, law.exponent) == pytest.approx((factor, exponent))
    assert law(500) == pytest.approx(factor * 500**exponent)


def test_the_law_of_two_points_by_hand():
    """From 10 to 1,000 tokens the ids grow tenfold: the square root."""
    assert vars(fit_heaps_law([(10, 20), (1_000, 200)])) == pytest.approx({"factor": 20 / 10**0.5, "exponent": 0.5})


def test_the_first_points_are_ignored():
    late = [(10_000, 100), (20_000, 140)]
    assert fit_heaps_law([(1, 1), (10, 10), *late]) == fit_heaps_law(late)


def test_a_bending_curve_is_extrapolated_from_its_end():
    """K = n / (1 + (n / 1000) ** 0.4) is steep at first, like text; extrapolate from 100,000 to 200,000 tokens."""
    points = [(round(10 ** (i / 10)), round(n / (1 + (n / 1000) ** 0.4))) for i in range(51) for n in [10 ** (i / 10)]]
    law = fit_heaps_law(points)
    assert law(2e5) == pytest.approx(2e5 / (1 + 200**0.4), rel=0.05)


@pytest.mark.parametrize("points", [(), ((7, 3),)])
def test_fewer_than_two_points_have_no_law(points):
    assert fit_heaps_law(points) is None


@needs_matplotlib
@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_figures_have_the_format_of_their_suffix(suffix, start):
    curves = [Curve("_a $name$ with _ and ^", POINTS, 900), Curve("none", (), 100)]
    assert render_figure(check_figure_path(f"x.{suffix}"), curves).startswith(start)


@needs_matplotlib
def test_the_figure_shows_names_law_and_vocab_size():
    """matplotlib writes the text of an SVG as comments."""
    figure, law = render_figure("svg", [Curve("bert", POINTS, 30_522)]).decode(), fit_heaps_law(POINTS)
    for text in ("bert", f"Heaps' law, K = {law.factor:.3g} n^{law.exponent:.3f}", "V = 30,522", "distinct tokens"):
        assert f"<!-- {text} -->" in figure


@needs_matplotlib
def test_figures_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"x\.xyz: found \.xyz, expected one of .*\.png"):
        check_figure_path(str(tmp_path / "x.xyz"))
    with pytest.raises(FormatError, match="x: found no suffix"):
        check_figure_path(str(tmp_path / "x"))
    with pytest.raises(FormatError, match=r"none/x\.png: no such folder"):
        check_figure_path(str(tmp_path / "none" / "x.png"))


def test_the_error_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PemaError, match=r"needs matplotlib.*pip install 'pema-adapters\[plot\]'"):
        check_figure_path("x.png")


def test_fitting_does_not_import_matplotlib():
    code = (
        "import sys; from pema_adapters.analysis.heaps_law import fit_heaps_law; assert fit_heaps_law([(1, 1), (9, 3)])\n"
        "assert not {'matplotlib', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=REPOSITORY)


def test_the_law_has_a_readable_repr():
    assert repr(HeapsLaw(2.0, 0.5)) == "HeapsLaw(factor=2.0, exponent=0.5)"
