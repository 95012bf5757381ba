"""pema-scan on every kind of file, compared with counting by hand."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pema_adapters import PartialVocabulary
from pema_adapters.cli.scan import main
from tests.paths import REPOSITORY

pytestmark = pytest.mark.usefixtures("settings_as_they_were")

WORDS = ["[PAD]", "[UNK]", "a", "b", "c", "d", "e", "f", "g", "h"]
V = len(WORDS)
ROWS = [{"premise": "a b", "hypothesis": "c", "label": 0}, {"premise": "a zz", "hypothesis": None, "label": 1}]
IDS = {1, 2, 3, 4}  # [UNK] a b c
LINES = "\n".join(map(json.dumps, ROWS))
TABLE = "text,label\na b,1\nzz,0\nc a,0\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the tokenizer `tok`; nothing outside it is read or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained("tok")
    return tmp_path


def make_tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def write_folder(path):
    path.mkdir()
    (path / "train.jsonl").write_text(LINES)


SOURCES = {
    "x.txt": lambda path: path.write_text("a b\n\nzz c\n"),
    "x.jsonl": lambda path: path.write_text(LINES),
    "x.json": lambda path: path.write_text(json.dumps(ROWS)),
    "x.csv": lambda path: path.write_text(TABLE),
    "x.tsv": lambda path: path.write_text(TABLE.replace(",", "\t")),
    "x.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "x.txt.gz": lambda path: path.write_bytes(gzip.compress(b"a b\nzz c\n")),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "x.csv.gz": lambda path: path.write_bytes(gzip.compress(TABLE.encode())),
    "saved": lambda path: Dataset.from_list(ROWS).save_to_disk(path),
    "saved-splits": lambda path: DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(path),
    "folder": write_folder,
    "tokenized": lambda path: Dataset.from_list([{"input_ids": [1, 2, 3, 4], "text": "h h h"}]).save_to_disk(path),
}


def scanned(capsys, *arguments):
    code = main(["--tokenizer", "tok", "--json", "--data", *arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


# datasets leaves it to the garbage collector to close CSV files
@pytest.mark.filterwarnings("ignore:Exception ignored in.*sv:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_data_is_scanned(source, folder, capsys):
    SOURCES[source](folder / source)
    capsys.readouterr()
    figures = scanned(capsys, source)
    assert (figures["partial_vocab_size"], figures["vocab_size"]) == (len(IDS), V)
    assert figures["reduction"] == 1 - len(IDS) / V
    assert not any(path.stat().st_size for path in (folder / "cache").rglob("*.*"))  # no copy of local files, but locks


def test_the_report_as_text(folder, capsys):
    """The whole output, with a model and two kinds of data."""
    (folder / "x.txt").write_text("a b c a\n")
    Dataset.from_dict({"input_ids": [[5, 6]]}).save_to_disk("ids")
    save_config(folder, vocab_size=1200, hidden_size=64)
    capsys.readouterr()
    assert main(["--tokenizer", "tok", "--data", "x.txt", "--data", "ids", "--model", "base"]) == 0
    assert capsys.readouterr().out == (
        "tokenizer                  tok\n"
        "data                       x.txt, ids\n"
        "columns                    text, input_ids\n"
        "model                      base\n"
        "rows of the embedding (V)  1,200\n"
        "tokens seen                6\n"
        "distinct tokens (K)        5\n"
        "reduction                  99.6%\n"
        "embedding width (d)        64\n"
        "embedding parameters       76,800\n"
        "  with PEMA                320\n"
        "\n"
        "note: only the embedding is counted, not the model: base: cannot build AutoModel from this config: "
        "The hidden size (64) is not a multiple of the number of attention heads (12)\n"
    )


def save_config(folder, **config):
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "bert", **config}))


def test_the_width_of_factorized_embeddings_is_found(folder, capsys):
    (folder / "x.txt").write_text("a b")
    save_config(folder, model_type="albert", vocab_size=20, hidden_size=64, embedding_size=8)
    figures = scanned(capsys, "x.txt", "--model", "base")
    assert (figures["embedding_dim"], figures["embedding_parameters"]) == (8, 160)
    assert figures["partial_embedding_parameters"] == 16


def test_the_rows_that_a_tokenizer_states_are_used(folder, capsys):
    (folder / "x.txt").write_text("a b")
    config = json.loads((folder / "tok" / "tokenizer_config.json").read_text())
    (folder / "tok" / "tokenizer_config.json").write_text(json.dumps(config | {"embedding_rows": 64}))
    assert scanned(capsys, "x.txt")["vocab_size"] == 64


def test_text_column_and_max_length(folder, capsys):
    (folder / "x.jsonl").write_text(json.dumps({"words": ["a b", "c"], "text": "d e f", "input_ids": [9]}))
    (folder / "y.jsonl").write_text(json.dumps({"other": "g h"}))
    figures = scanned(capsys, "x.jsonl", "y.jsonl", "--text-column", "text", "--text-column", "other")
    assert (figures["columns"], figures["tokens"], figures["partial_vocab_size"]) == (["text", "other"], 5, 5)
    assert scanned(capsys, "x.jsonl", "--text-column", "text", "--max-length", "2")["tokens"] == 2
    assert scanned(capsys, "x.jsonl", "--text-column", "words")["tokens"] == 3
    assert scanned(capsys, "x.jsonl")["columns"] == ["input_ids"]


PAIRS = [
    {"s": "a b c", "t": "d e", "s,t": "h"},
    {"s": None, "t": "f", "s,t": "g"},
]


def test_pairs_are_tokenized_as_in_training(folder, capsys):
    """As training has them: the tokenizer, here one with [PAD] between two texts, gets both; truncated longest first."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A", pair="$A [PAD] $B", special_tokens=[("[PAD]", 0)]
    )
    tokenizer.save_pretrained("tok")
    Dataset.from_list(PAIRS).remove_columns("s,t").to_parquet("x.parquet")
    Dataset.from_list(PAIRS).to_parquet("y.parquet")
    capsys.readouterr()
    pair = scanned(capsys, "x.parquet", "--text-column", "s,t", "--save", "v")
    assert (pair["columns"], pair["tokens"]) == (["s,t"], 6 + 1)
    assert set(PartialVocabulary.load("v")) == {0, 2, 3, 4, 5, 6, 7}
    short = scanned(capsys, "x.parquet", "--text-column", "s,t", "--max-length", "4", "--save", "v")
    assert short["tokens"] == 4 + 1
    assert set(PartialVocabulary.load("v")) == {*tokenizer("a b c", "d e", truncation=True, max_length=4).input_ids, 7}
    alone = scanned(capsys, "x.parquet", "--text-column", "s", "--text-column", "t")
    assert (alone["columns"], alone["tokens"], alone["partial_vocab_size"]) == (["s", "t"], 6, 6)
    assert scanned(capsys, "y.parquet", "--text-column", "s,t", "--save", "v")["tokens"] == 2
    assert set(PartialVocabulary.load("v")) == {8, 9}


FAILURES = {
    "half a pair": (["x.jsonl", "--text-column", "premise,q"], "x.jsonl: no column 'q'; found: premise (str), hypo"),
    "no pair": (["x.jsonl", "--text-column", "p,q"], "x.jsonl: no column 'p', 'q'; found: premise (str), hypothesis"),
    "three of a pair": (["x.jsonl", "--text-column", "a,b,c"], "x.jsonl: no column 'a,b,c'; found: premise (str)"),
    "a pair in no split": (
        ["x.jsonl", "bad2.jsonl", "--text-column", "premise,other", "--text-column", "label"],
        "no split has both of a pair; found: premise (str), hypothesis (str), label (int), other (str)",
    ),
    "no such file": (["none.txt"], "none.txt: no such file or folder"),
    "unknown suffix": (["x.xml"], "x.xml: found .xml, expected one of .txt, .json"),
    "damaged": (["bad.jsonl"], "bad.jsonl: cannot be read as a data set: "),
    "no text": (["numbers.jsonl"], "numbers.jsonl: no column that holds strings; found: n (int)"),
    "no such column": (["x.jsonl", "--text-column", "q"], "x.jsonl: no column 'q'; found: premise (str), hypothesis"),
    "one column nowhere": (
        ["x.jsonl", "--text-column", "q", "--text-column", "premise"],
        "no column 'q' anywhere in the data; found: premise (str)",
    ),
    "empty": (["empty.txt"], "no rows"),
    "no model": (["x.jsonl", "--model", "nowhere"], "nowhere: no model config found, here or on the Hub"),
    "a model that is a list": (["x.jsonl", "--model", "listed"], "listed: no model config found, here or on the Hub"),
    "small model": (["x.jsonl", "--model", "base"], "x.jsonl, column 'premise', row 0: token id 3 is outside"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_are_one_line(failure, folder, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True)
    (folder / "x.jsonl").write_text(LINES)
    (folder / "x.xml").write_text("<x/>")
    (folder / "bad.jsonl").write_text('{"a": "b"}\n{"a": ')
    (folder / "numbers.jsonl").write_text('{"n": 1}')
    (folder / "bad2.jsonl").write_text('{"other": "a", "label": 1}')
    (folder / "empty.txt").touch()
    (folder / "listed").mkdir()
    (folder / "listed" / "config.json").write_text("[]")
    save_config(folder, vocab_size=3, hidden_size=2)
    arguments, message = FAILURES[failure]
    assert main(["--tokenizer", "tok", "--data", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pema-scan: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "\\n" not in err, "a line break of a library became an escape"


@pytest.mark.parametrize("arguments", [[], ["--data", "x"], ["--tokenizer", "t", "--data", "x", "--max-length", "0"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pema-scan" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from pema_adapters.cli.scan import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'numpy', 'torch', 'transformers', 'datasets', 'adapters', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert "--text-column" in done.stdout


@pytest.mark.parametrize("more", [[], ["--tokenizer", "tok"]])
def test_names_reach_the_terminal_escaped(folder, capsys, more):
    """Of the tokenizer, the data and the columns, in a list and in a table."""
    name = "tok\x1b[31m\nreduction 99%"
    make_tokenizer().save_pretrained(name)
    Path("x\x1b[2J.jsonl").write_text(json.dumps({"text\u202e": "a b"}))
    assert main(["--tokenizer", name, *more, "--data", "x\x1b[2J.jsonl", "--unused", "2"]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert r"tok\x1b[31m\nreduction 99%" in out and "\nreduction 99%" not in out
