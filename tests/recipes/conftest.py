"""The recipes are commands, not a package: their folder has to be on the path. What they run on is tiny."""

import sys

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.paths import RECIPES

sys.path.insert(0, str(RECIPES))

from glue import GLUE
from runs.experiments import main
from runs.training import Place
from tests.recipes.tiny import SPECIAL, WORDS, V, lines, write


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


@pytest.fixture
def place(data_dir, tmp_path):
    return Place(data_dir, tmp_path / "checkpoints", save_steps=0, threads=1, bar=False)


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
