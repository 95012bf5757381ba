"""`recipes/glue.py` and `recipes/xnli.py`, as commands on tiny models and files of the data's layout."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from compacter_baselines import METHODS
from glue import GLUE
from runs.options import known_names
from runs.tasks import Task, TaskError, plain
from runs.training import run
from tests.recipes.conftest import RECIPES
from tests.recipes.tiny import BY_NAME, SETTING, V, lines, write
from xnli import XNLI


class TestRun:
    def test_full_fine_tuning_gives_the_same_with_pema(self, base, place):
        """Dropout and the order of the data are the same; the loss is a sum over every step."""
        off, on = (run(BY_NAME["CoLA"], replace(SETTING, base=base, pema=pema), place) for pema in ("off", "on"))
        assert (on["scores"], on["training_loss"]) == (off["scores"], off["training_loss"])
        assert off["rows"] == V > on["rows"]
        assert off["trained_parameters"] - on["trained_parameters"] == (V - on["rows"]) * 48

    def test_frozen_rows_change_nothing(self, base, place):
        setting = replace(SETTING, base=base, method="LoRA")
        off, frozen, on = (run(BY_NAME["RTE"], replace(setting, pema=pema), place) for pema in ("off", "frozen", "on"))
        assert (frozen["scores"], frozen["training_loss"]) == (off["scores"], off["training_loss"])
        assert frozen["trained_parameters"] == off["trained_parameters"] < on["trained_parameters"]
        assert on["training_loss"] != off["training_loss"]  # there the rows learn, too

    def test_a_number_is_learned_as_one(self, base, place):
        scores = run(BY_NAME["STS-B"], replace(SETTING, base=base), place)["scores"]["validation"]
        assert set(scores) == {"Spearman", "Pearson"}

    def test_every_scored_split_is_scored(self, base, place):
        found = run(BY_NAME["MNLI"], replace(SETTING, base=base, pema="on"), place)
        assert set(found["scores"]) == {"validation_matched", "validation_mismatched"}
        assert set(run(XNLI.tasks["sw"], replace(SETTING, base=base), place)["scores"]) == {"test", "validation"}

    def test_a_subset_is_the_same_for_every_seed(self, base, place):
        one, other = (run(BY_NAME["CoLA"], replace(SETTING, base=base, train_rows=16, seed=s), place) for s in (0, 1))
        assert (one["train_rows"], one["steps"]) == (other["train_rows"], other["steps"]) == (16, 4)


class TestTask:
    def test_scores(self):
        """Of four rows two are told to be 1, and one of these is: precision and recall are 1/2, as of the other class."""
        logits, labels = [[0, 1], [0, 1], [1, 0], [1, 0]], [1, 0, 1, 0]
        assert BY_NAME["MRPC"].scores(logits, labels) == {"F1": 0.5, "accuracy": 0.5}
        assert BY_NAME["CoLA"].scores(logits, labels) == {"Matthews": 0.0, "accuracy": 0.5}
        assert BY_NAME["STS-B"].scores([[0.1], [0.3], [0.2]], [1, 3, 2]) == pytest.approx({"Spearman": 1, "Pearson": 1})

    def test_no_such_folder(self, tmp_path):
        (tmp_path / "CoLA").mkdir()
        with pytest.raises(TaskError, match=r"no folder RTE \(found: CoLA\); without --data-dir the Hub is asked"):
            BY_NAME["RTE"].load(tmp_path)

    def test_no_such_split(self, tmp_path):
        write(tmp_path / "rte" / "train.tsv.gz", lines(2, pairs=True, labelled=True))
        with pytest.raises(TaskError, match=r"RTE: no split validation \(found: train\)"):
            BY_NAME["RTE"].load(tmp_path)

    def test_columns_that_are_no_texts(self):
        with pytest.raises(TaskError, match=r"found the columns a, b, c, label, expected one or two of text"):
            Task("RTE", ("", "")).texts(["a", "b", "c", "label"])

    def test_the_hub(self, hub, tmp_path, monkeypatch):
        """GLUE is one repository with a configuration a task."""
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
        card = "configs:\n- config_name: cola\n  data_files:\n  - {split: train, path: cola/train.jsonl}\n"
        row = b'{"sentence": "a film", "label": 1, "idx": 0}\n'
        files = {"cola/train.jsonl": row, "cola/validation.jsonl": row * 2}
        card += "  - {split: validation, path: cola/validation.jsonl}\n"
        hub.publish("nyu-mll/glue", {"README.md": f"---\n{card}---\n".encode(), **files})
        data = BY_NAME["CoLA"].load(None)
        assert {split: len(rows) for split, rows in data.items()} == {"train": 1, "validation": 2}
        assert BY_NAME["CoLA"].texts(data["train"].column_names) == ["sentence"]

    def test_quotation_marks_are_letters(self, data_dir):
        assert BY_NAME["SST-2"].load(data_dir)["train"]["sentence"][0] == 'the film was "very good'


def test_no_two_methods_or_tasks_go_by_one_name():
    """Compacter and Compacter++, say: a run's file has these names, too."""
    assert known_names(METHODS)("compacter,COMPACTER++,full fine-tuning,(ia)^3") == [
        "Compacter", "Compacter++", "Full fine-tuning", "(IA)^3",
    ]  # fmt: skip
    for names in (METHODS, GLUE.tasks, XNLI.tasks):
        assert len({plain(name) for name in names}) == len(names)


@pytest.mark.slow
def test_the_command_goes_on_and_refuses_other_settings(base, data_dir, tmp_path, glue):
    out = tmp_path / "out"
    options = [
        "--base",
        base,
        "--data-dir",
        data_dir,
        "--tasks",
        "cola,sst-2",
        "--train-rows",
        "40,20",
        "--output",
        out,
    ]
    first = subprocess.run(
        [sys.executable, str(RECIPES / "glue.py"), *map(str, options), "--seeds", "0", "--pema", "off"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    done = {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert set(done) == {"cola-fullfinetuning-off-seed0.json", "sst2-fullfinetuning-off-seed0.json"}
    code, shown, errors = glue(*options, "--seeds", 0, "--plot", tmp_path / "figure.png")
    assert (code, "2 of 4 runs are done already" in errors) == (0, True)
    assert all((out / "runs" / name).stat().st_mtime_ns == time for name, time in done.items())
    assert len(json.loads((out / "results.json").read_text())) == 4
    header, _, off, on = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header] == [
        "method", "PEMA", "CoLA Matthews", "SST-2 accuracy", "trained", "peak MB", "s/step",
    ]  # fmt: skip
    assert off[2:4] == on[2:4]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    code, _, errors = glue(*options, "--seeds", 0, "--learning-rate", 0.1)
    assert code == 1
    assert "made with learning_rate 2e-05, now asked for with 0.1: give another --output, or delete" in errors


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--tasks", "CoLA,Cola2"], 2, "Cola2 is not one of CoLA, MNLI"),
        (["--methods", "LoRa,Lorra"], 2, "Lorra is not one of Full fine-tuning"),
        (
            ["--tasks", "CoLA,RTE", "--train-rows", "1,2,3"],
            2,
            "found 3 numbers, expected 1, or 2, one for each of --tasks",
        ),
        (
            ["--pema", "frozen"],
            2,
            'found --methods "Full fine-tuning" and --pema frozen, but what is fine-tuned fully has',
        ),
        (["--plot", "out.foo"], 2, "argument --plot: out.foo: found .foo, expected one of ."),
        (["--plot", "out"], 2, "argument --plot: out: found no suffix, expected one of ."),
        (["--plot", "no/where.png"], 2, "argument --plot: no/where.png: no such folder: no"),
        pytest.param(
            ["--data-dir", "nowhere", "--tasks", "CoLA"],
            1,
            "nowhere: no folder CoLA (found: no folders)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_run_is_one_line(base, tmp_path, glue, arguments, code, message):
    found, _, errors = glue("--base", base, "--output", tmp_path, *arguments)
    assert (found, "Traceback" in errors) == (code, False)
    assert message in errors


def test_a_figure_cannot_be_a_folder(base, tmp_path, glue):
    (tmp_path / "figure.png").mkdir()
    code, _, errors = glue("--base", base, "--output", tmp_path / "out", "--plot", tmp_path / "figure.png")
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert f"argument --plot: {tmp_path / 'figure.png'}: is a folder, expected a file" in errors


@pytest.mark.parametrize(
    "content, evidence",
    [
        (b'{"tas', "Unterminated string starting at: line 1 column 2 (char 1)"),
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"\x80\x80\x80\x80", "'utf-8' codec can't decode byte 0x80 in position 0: invalid start byte"),
        (b'{"task": "CoLA", "setting": {}}', "found no peak_bytes, scores, seconds_per_step, trained_parameters"),
        (b"[]", "found no peak_bytes, scores, seconds_per_step, setting, task, trained_parameters"),
    ],
)
def test_a_damaged_result_is_one_line(base, data_dir, tmp_path, glue, content, evidence):
    file = tmp_path / "runs" / "cola-lora-off-seed0.json"
    file.parent.mkdir()
    file.write_bytes(content)
    options = ["--base", base, "--data-dir", data_dir, "--tasks", "CoLA", "--methods", "LoRA", "--seeds", 0]
    code, _, errors = glue(*options, "--pema", "off", "--output", tmp_path)
    assert (code, errors.count("\n")) == (1, 1)
    assert f"{file}: damaged, no result of a run ({evidence}): delete the file, and the run is done again" in errors
