"""Result files and the pages that are made of them."""

import json
import sys

import pytest

from tests.paths import REPOSITORY, TOOLS

sys.path.append(str(TOOLS))

import render_results
from harness import results
from harness.command_line import make_parser, some_of
from harness.results import RECONSTRUCTED, read_results, write_results
from harness.tables import WIDEST, format_table
from harness.timing import format_ratio, rotate, round_ratios, time_paired


def test_a_result_file_says_how_it_was_made_and_nothing_of_this_machine_s_paths(tmp_path, monkeypatch):
    given = ["tools/bench_x.py", "--dir", str(tmp_path / "deep" / "place"), "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", given)
    options = make_parser("").parse_args(given[3:])
    write_results(options, {"seconds": [1.5, 2.5], "where": tmp_path / "base", "error": f"{REPOSITORY}/a: no"})
    found = read_results(tmp_path / "x.json")
    assert found["figures"] == {"seconds": [1.5, 2.5], "where": "base", "error": "a: no"}
    assert found["command"].endswith("--dir place --json x.json")
    assert set(found) == {"tool", "command", "commit", "dirty", "date", "machine", "versions", "figures"}
    assert found["machine"]["cores"] and found["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(found)


def test_save_writes_beside_the_other_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["tools/bench_x.py", "--save"])
    write_results(make_parser("").parse_args(["--save"]), {}, "other")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["other.json"]
    write_results(make_parser("").parse_args([]), {})
    assert len([*(tmp_path / "results").iterdir()]) == 1


def test_what_is_no_result_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: no result file: found neither 'figures' nor"):
        read_results(tmp_path / "x.json")


def test_ratios_have_a_spread_and_less_than_the_floor_is_noise():
    times = {"one": [1.0, 2.0, 3.0], "floor": [2.0, 2.0, 2.0]}
    ratios = round_ratios(times, "one", "floor")
    assert format_ratio(ratios) == "1.00 (0.50 to 1.50)"
    assert format_ratio([0.9, 0.8, 1.1], floor=True) == "0.90 (0.80 to 1.10), noise"
    assert format_ratio([0.9]) == "0.90 (one round)"


def test_contestants_begin_in_turn_and_the_first_round_does_not_count():
    assert list(rotate("abc", 4)) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    calls = []
    times = time_paired({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert "".join(calls) == "abbaab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_tables():
    assert format_table(["a", "long"], [[1, 2]]) == "| a   | long |\n| --- | ---- |\n| 1   | 2    |"
    wide = format_table(["a"], [["x" * (WIDEST + 1)], [1]]).splitlines()
    assert (wide[0], wide[3]) == ("| a   |", "| 1   |")


def test_names_of_a_list_are_checked():
    assert some_of(["a", "b"])("b,a") == ("b", "a")
    with pytest.raises(Exception, match="c: expected some of a, b"):
        some_of(["a", "b"])("a,c")


def test_a_block_is_written_from_its_result_file(tmp_path, monkeypatch):
    table = {"header": ["way", "s"], "rows": [["PEMA", "1.0"]]}
    saved = {"tool": "bench_x", "command": "python tools/bench_x.py", "commit": "1234567890", "date": "2026-11-20",
             RECONSTRUCTED: "README at abc", "table": table}  # fmt: skip
    (tmp_path / "bench_x.json").write_text(json.dumps(saved))
    monkeypatch.setattr(render_results, "RESULTS", tmp_path)
    begin, end = "<!-- results: bench_x begin -->", "<!-- results: bench_x end -->"
    text = render_results.render_page(f"a\n{begin}\nold\n{end}\nb\n")
    assert text.startswith(f"a\n{begin}\n| way  | s   |\n| ---- | --- |\n| PEMA | 1.0 |\n\nNot measured anew: ")
    assert "since commit 1234567 of 2026-11-20" in text and text.endswith(f"`\n{end}\nb\n")
    assert render_results.render_page(text) == text


@pytest.mark.parametrize("page", render_results.PAGES, ids=lambda page: page.parent.name)
def test_pages_are_those_of_the_result_files(page):
    assert not render_results.update(page, is_check=True), "run python tools/render_results.py"
