"""`recipes/glue.py` and `recipes/xnli.py`, as commands on tiny models and files of the data's layout."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _experiments import main
from _options import listed_of
from _tasks import Task, TaskError, plain
from _training import Place, Setting, run
from compacter_baselines import METHODS
from glue import GLUE
from transformers import BertConfig, BertModel, BertTokenizerFast, Trainer
from xnli import XNLI

from tests.recipes.conftest import RECIPES

WORDS = ["good", "bad", "film", "book", "very", "quite", "the", "a", "was", "is"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
V = 40
"""Rows of the matrix, most of which no text uses."""
BY_NAME = GLUE.tasks
SETTING = Setting(
    base="", method="Full fine-tuning", pema="off", seed=0, learning_rate=1e-2, batch_size=8, epochs=2, max_length=16,
    warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=0.0, train_rows=0, bf16=False, group_by_length=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny BERT with dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=V, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=20,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """CoLA and SST-2 of one text, RTE of two, STS-B of numbers, MNLI with two validation splits; "Swahili"."""
    folder = tmp_path_factory.mktemp("data")
    for name, labels in {"CoLA": 2, "sst2": 2, "RTE": 2, "STS-B": 1, "MNLI": 3, "sw": 3}.items():
        splits = ["validation_matched", "validation_mismatched"] if name == "MNLI" else ["validation"]
        for split in ["train", *splits, "test"]:
            with_labels = split != "test" or name == "sw"
            write(
                folder / name / f"{split}.tsv.gz",
                lines(labels, pairs=name not in {"CoLA", "sst2"}, labelled=with_labels),
            )
    return folder


def lines(labels, pairs, labelled):
    """40 rows: whether they have "good" decides the label; a quotation mark is a letter."""
    header = ["sentence1", "sentence2"] if pairs else ["sentence"]
    yield [*header, *(["label"] if labelled else [])]
    for number in range(40):
        text = f'the {WORDS[2 + number % 2]} was "{WORDS[4 + number % 2]} {WORDS[number // 2 % 2]}'
        label = number / 40 if labels == 1 else number // 2 % 2
        yield [text, *(["a film"] if pairs else []), *([label] if labelled else [])]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines("\t".join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def place(data_dir, tmp_path):
    return Place(data_dir, tmp_path / "checkpoints", save_steps=0, threads=1, bar=False)


class TestRun:
    def test_full_fine_tuning_gives_the_same_with_pema(self, base, place):
        """Dropout and the data's order are drawn alike; the loss is a sum over every step."""
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

    @pytest.mark.parametrize("method, pema", [("Full fine-tuning", "on"), ("Compacter", "on")])
    def test_goes_on_from_a_checkpoint(self, base, place, method, pema, monkeypatch):
        """Interrupted after step 6 of 10, with a checkpoint of step 4, it ends where it would have ended."""
        setting = replace(SETTING, base=base, method=method, pema=pema)
        whole = run(BY_NAME["CoLA"], setting, place)
        assert whole["steps"] == 10
        step, steps = Trainer.training_step, []

        def interrupted(*args, **kwargs):
            steps.append(1)
            if len(steps) == 7:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(BY_NAME["CoLA"], setting, replace(place, save_steps=4))
        again = run(BY_NAME["CoLA"], setting, replace(place, save_steps=4))
        assert len(steps) == 7 + 6
        assert found_alike(again) == found_alike(whole)

    @pytest.mark.parametrize(
        "cut, steps",
        [("checkpoint-4/optimizer.pt", 10), ("checkpoint-8/optimizer.pt", 6), ("checkpoint-8/rng_state.pth", 6)],
    )
    def test_goes_on_from_the_newest_whole_checkpoint(self, base, place, cut, steps, monkeypatch):
        """Interrupted in the middle of a file of a checkpoint: that one does not count."""
        setting, place = replace(SETTING, base=base), replace(place, save_steps=4)
        whole = run(BY_NAME["CoLA"], setting, replace(place, save_steps=0))
        save = torch.save

        def interrupted(content, path, *args, **kwargs):
            save(content, path, *args, **kwargs)
            if str(path).endswith(cut):
                os.truncate(path, Path(path).stat().st_size // 2)
                raise KeyboardInterrupt

        with monkeypatch.context() as patches:
            patches.setattr(torch, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(BY_NAME["CoLA"], setting, place)
        assert (place.checkpoints / cut).exists()
        taken = counted_steps(monkeypatch)
        assert found_alike(run(BY_NAME["CoLA"], setting, place)) == found_alike(whole)
        assert len(taken) == steps
        assert [path.name for path in place.checkpoints.iterdir()] == ["checkpoint-10"]

    def test_a_checkpoint_of_another_setting_is_refused(self, base, place, monkeypatch):
        setting, place = replace(SETTING, base=base), replace(place, save_steps=4)
        with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
            patches.setattr(Trainer, "evaluate", interrupt)
            run(BY_NAME["CoLA"], setting, place)
        with pytest.raises(TaskError, match=r"checkpoint-10: made with seed 0, now asked for with 1: .* or delete it"):
            run(BY_NAME["CoLA"], replace(setting, seed=1), place)

    def test_a_checkpoint_of_nothing_but_half_a_model_does_not_count(self, base, place):
        setting = replace(SETTING, base=base)
        whole = run(BY_NAME["CoLA"], setting, place)
        half = place.checkpoints / "checkpoint-4"
        half.mkdir(parents=True)
        (half / "config.json").write_text("{}")
        (half / "pytorch_model.bin").write_bytes(b"PK\x03\x04\x00\x00")
        assert found_alike(run(BY_NAME["CoLA"], setting, replace(place, save_steps=4))) == found_alike(whole)

    def test_goes_on_after_the_last_step(self, base, place, monkeypatch):
        """Interrupted while it was scored, with nothing left to train."""
        setting, place = replace(SETTING, base=base), replace(place, save_steps=4)
        whole = run(BY_NAME["CoLA"], setting, replace(place, save_steps=0))

        with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
            patches.setattr(Trainer, "evaluate", interrupt)
            run(BY_NAME["CoLA"], setting, place)
        taken = counted_steps(monkeypatch)
        assert found_alike(run(BY_NAME["CoLA"], setting, place)) == found_alike(whole)
        assert taken == []

    @pytest.mark.parametrize("learning_rate, finite", [(1e-2, True), (1e30, False)])
    def test_the_training_loss_is_trainers_own(self, base, place, learning_rate, finite, monkeypatch):
        """Also where losses are not numbers, which Trainer leaves out of the mean."""
        train, step, own, losses = Trainer.train, Trainer.training_step, [], []

        def trained(*args, **kwargs):
            own.append(train(*args, **kwargs))
            return own[-1]

        def stepped(*args, **kwargs):
            losses.append(step(*args, **kwargs))
            return losses[-1]

        monkeypatch.setattr(Trainer, "train", trained)
        monkeypatch.setattr(Trainer, "training_step", stepped)
        found = run(BY_NAME["RTE"], replace(SETTING, base=base, learning_rate=learning_rate), place)
        assert all(math.isfinite(loss) for loss in losses) == finite
        assert found["training_loss"] == own[0].training_loss > 0


def found_alike(result):
    """Of a run's result, what does not depend on time and memory."""
    return {name: result[name] for name in ("scores", "steps", "training_loss")}


def counted_steps(monkeypatch):
    """A list that grows with each step of training from now on."""
    step, taken = Trainer.training_step, []

    def counted(*args, **kwargs):
        taken.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counted)
    return taken


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
    assert listed_of(METHODS)("compacter,COMPACTER++,full fine-tuning,(ia)^3") == [
        "Compacter", "Compacter++", "Full fine-tuning", "(IA)^3",
    ]  # fmt: skip
    for names in (METHODS, GLUE.tasks, XNLI.tasks):
        assert len({plain(name) for name in names}) == len(names)


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
        (["--data-dir", "nowhere", "--tasks", "CoLA"], 1, "nowhere: no folder CoLA (found: no folders)"),
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


def test_a_command_that_is_killed_goes_on(base, data_dir, tmp_path, glue):
    """And its run dies with it, which would write where the next command works. The figure is in a folder to come."""
    options = [
        "--base", base, "--data-dir", data_dir, "--tasks", "CoLA", "--methods", "LoRA", "--pema", "on", "--seeds", 0,
        "--batch-size", 1, "--epochs", 10, "--threads", 1, "--save-steps", 10,
    ]  # fmt: skip
    out, checkpoints = tmp_path / "killed", tmp_path / "killed" / "checkpoints" / "cola-lora-on-seed0"
    command = subprocess.Popen([sys.executable, str(RECIPES / "glue.py"), *map(str, options), "--output", str(out)])
    wait_for(lambda: any(checkpoints.glob("checkpoint-*/recipe.json")))
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    time.sleep(2)
    left = sorted(path.name for path in checkpoints.iterdir())
    assert not (out / "runs").exists()
    time.sleep(1)
    assert sorted(path.name for path in checkpoints.iterdir()) == left
    assert glue(*options, "--output", out, "--plot", out / "figure.png")[0] == 0
    assert glue(*options, "--output", tmp_path / "whole", "--plot", tmp_path / "whole" / "figure.png")[0] == 0
    killed, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole"))
    assert found_alike(killed[0]) == found_alike(whole[0])
    assert not checkpoints.exists()


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def wait_for(happened, seconds=120):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@pytest.fixture
def glue(monkeypatch, capsys):
    """The command in this process: exit code, what it printed, and its errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["glue.py", *map(str, arguments)])
        try:
            code = main(GLUE, "")
        except SystemExit as usage:
            code = usage.code
        return code, *capsys.readouterr()

    return call
