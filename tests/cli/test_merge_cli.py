import json

import pytest

from pema_adapters.cli.merge import main
from tests.merging.conftest import T, make_adapter, make_base, noise, read  # noqa: F401 - fixtures


@pytest.fixture
def pair(make_base, make_adapter):  # noqa: F811
    base = make_base()
    return base, make_adapter(base)


def arguments(pair, *more):
    return ["--base", str(pair[0].folder), "--delta", str(pair[1].folder), *more]


def test_base_and_delta_are_enough(pair, capsys):
    assert main(arguments(pair)) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith(f"wrote {pair[1].folder}/merged (")
    assert lines[1:] == [
        "  rows:    6 of 20 in the embedding matrix",
        "  tensors: 1 changed, 4 copied byte for byte",
    ]
    assert err == ""


def test_json_prints_the_report(pair, capsys):
    assert main(arguments(pair, "--json", "--verify")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows_merged"] == 6
    assert report["output"].endswith("/merged")


def test_quiet_prints_nothing(pair, capsys):
    assert main(arguments(pair, "--quiet")) == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_writes_nothing(pair, capsys):
    assert main(arguments(pair, "--dry-run", "--verify")) == 0
    assert capsys.readouterr().out.startswith("would write ")
    assert not (pair[1].folder / "merged").exists()


def test_a_refusal_is_one_line_and_exit_code_1(pair, capsys):
    assert main(arguments(pair, "--output", str(pair[0].folder))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err == f"pema-merge: error: output {pair[0].folder} is the base itself; choose another folder with --output\n"
    )


def test_overwrite_replaces_an_earlier_merge(pair, capsys):
    assert main(arguments(pair)) == 0
    assert main(arguments(pair)) == 1
    assert main(arguments(pair, "--overwrite")) == 0


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--base", "x"])
    assert stop.value.code == 2
    assert "--delta" in capsys.readouterr().err


def test_an_interrupt_is_one_line(pair, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pema_adapters.merging.api.write_plan", interrupted)
    assert main(arguments(pair)) == 1
    assert capsys.readouterr().err == "pema-merge: interrupted; nothing was left behind\n"
    assert not list(pair[1].folder.glob("*merged*"))


def test_the_summary_shows_how_to_load_what_stays_an_adapter(make_base, make_adapter, capsys):  # noqa: F811
    base = make_base()
    rest = {"bert.encoder.layer.0.adapters.task.down": T.of(noise(1, 4))}
    pair = base, make_adapter(base, rest=rest, head={"classifier.weight": T.of(noise(3, 4))})
    assert main(arguments(pair)) == 0
    out = pair[1].folder / "merged"
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "  load both, in Python (import adapters, transformers):",
        f'    model = transformers.BertForSequenceClassification.from_pretrained("{out}"); adapters.init(model)',
        f'    model.load_adapter("{out}/adapters/task", set_active=True, use_safetensors=True)',
    ]


def test_the_summary_shows_how_to_load_a_flexible_head(make_base, make_adapter, capsys):  # noqa: F811
    base = make_base()
    pair = base, make_adapter(base, flexible={"heads.task.1.weight": T.of(noise(3, 4))})
    assert main(arguments(pair)) == 0
    out = pair[1].folder / "merged"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f'    model = adapters.AutoAdapterModel.from_pretrained("{out}")',
        f'    model.load_head("{out}/adapters/task", use_safetensors=True)',
    ]


def test_progress_on_a_terminal_only(pair, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(arguments(pair)) == 0
    assert "merging: 100%" in capsys.readouterr().err
    assert main(arguments(pair, "--overwrite", "--quiet")) == 0
    assert capsys.readouterr().err == ""


def bytes_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_in_place_and_undo(pair, capsys):
    before = bytes_of(pair[0].folder)
    assert main(arguments(pair, "--in-place", "--verify")) == 0
    assert capsys.readouterr().out.startswith(f"changed {pair[0].folder} (")
    after = bytes_of(pair[0].folder)
    assert main(arguments(pair, "--output", str(pair[1].folder / "merged"), "--allow-base-mismatch")) == 0
    note = capsys.readouterr().out
    assert "note:    merged all the same: " in note and "--allow-base-mismatch" not in note
    merged = bytes_of(pair[1].folder / "merged")
    assert all(after[name] == merged[name] for name in before)  # merging twice is merging once
    assert main(["--base", str(pair[0].folder), "--undo"]) == 0
    assert bytes_of(pair[0].folder) == before
    assert main(["--base", str(pair[0].folder), "--undo"]) == 1
    assert "nothing to undo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            ["--base", "b", "--delta", "d", "--in-place", "--output", "x"],
            "--output: not allowed with argument --in-place",
        ),
        (
            ["--base", "b", "--delta", "d", "--in-place", "--undo"],
            "argument --undo: not allowed with argument --in-place",
        ),
        (
            ["--base", "b", "--delta", "d", "--in-place", "--overwrite"],
            "--in-place modifies the base itself: it cannot be combined with",
        ),
        (
            ["--base", "b", "--delta", "d", "--in-place", "--push-to-hub", "r"],
            "--in-place modifies the base itself: it cannot",
        ),
        (["--delta", "d", "--in-place"], "--in-place modifies the base: give its folder with --base"),
        (["--undo"], "--undo modifies the base: give its folder with --base"),
        (
            ["--base", "b", "--undo", "--dry-run"],
            "--undo can only be combined with --base and --quiet, found --dry-run",
        ),
        (
            ["--base", "b", "--undo", "--delta", "d"],
            "--undo can only be combined with --base and --quiet, found --delta",
        ),
        (["--delta", "d", "--private"], "--private, --create-pr, --commit-message and --token need --push-to-hub"),
    ],
)
def test_options_that_cannot_be_combined(given, line, capsys):
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


def test_the_summary_names_another_dtype(pair, capsys):
    assert main(arguments(pair, "--dtype", "bfloat16")) == 0
    assert "4 as they were, in bfloat16" in capsys.readouterr().out
    config = json.loads((pair[1].folder / "merged" / "config.json").read_bytes())
    assert config["dtype"] == "bfloat16"


def test_in_place_a_new_head_gets_a_shard_of_its_own(make_base, make_adapter, capsys):  # noqa: F811
    base = make_base(shards=2)
    pair = base, make_adapter(base, head={"classifier.weight": T.of(noise(3, 4))})
    before = bytes_of(base.folder)
    assert main(arguments(pair, "--output", str(pair[1].folder / "merged"))) == 0
    assert main(arguments(pair, "--in-place")) == 0
    assert read(base.folder) == read(pair[1].folder / "merged")
    index = json.loads((base.folder / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"]["classifier.weight"] == "model-added.safetensors"
    assert main(["--base", str(base.folder), "--undo"]) == 0
    assert bytes_of(base.folder) == before


def test_in_place_a_head_in_a_single_file(make_base, make_adapter, capsys):  # noqa: F811
    base = make_base()
    pair = base, make_adapter(base, head={"classifier.weight": T.of(noise(3, 4))})
    before = bytes_of(base.folder)
    assert main(arguments(pair, "--in-place")) == 0
    assert "model.safetensors is called model-00001-of-00002.safetensors now" in capsys.readouterr().out
    assert main(["--base", str(base.folder), "--undo"]) == 0
    assert bytes_of(base.folder) == before
