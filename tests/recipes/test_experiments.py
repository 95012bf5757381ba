"""`recipes/glue.py` and `recipes/xnli.py`, as commands on tiny models and files of the data's layout."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from _experiments import main
from _options import listed_of
from _tasks import Task, TaskError, plain
from _training import Place, Setting, run
from compacter_baselines import METHODS
from glue import GLUE
from transformers import BertConfig, BertModel, BertTokenizerFast
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

    @pytest.mark.filterwarnings("ignore:mtime may not be reliable")  # of checkpoints within a second
    @pytest.mark.parametrize("method, pema", [("Full fine-tuning", "on"), ("Compacter", "on")])
    def test_goes_on_from_a_checkpoint(self, base, place, method, pema, monkeypatch):
        """Interrupted after step 6 of 10, with a checkpoint of step 4, it ends where it would have ended."""
        from transformers import Trainer

        setting = replace(SETTING, base=base, method=method, pema=pema)
        whole = run(BY_NAME["CoLA"], setting, place)
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
        assert again["scores"] == whole["scores"]


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
        (["--data-dir", "nowhere", "--tasks", "CoLA"], 1, "nowhere: no folder CoLA (found: no folders)"),
    ],
)
def test_what_cannot_be_run_is_one_line(base, tmp_path, glue, arguments, code, message):
    found, _, errors = glue("--base", base, "--output", tmp_path, *arguments)
    assert (found, "Traceback" in errors) == (code, False)
    assert message in errors


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
