"""The scan cache: a second scan reads it, an interrupted scan resumes from it, and damage to it does no harm."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from pema_adapters.cli.scan import main
from pema_adapters.io.cache_folder import CacheFolder
from pema_adapters.scanning.cache import content_key
from pema_adapters.scanning.cache.cached_scan import DataSource, scan_with_cache
from pema_adapters.scanning.text_columns import Encoder
from pema_adapters.scanning.text_scanner import scan_text
from tests.paths import REPOSITORY

pytestmark = pytest.mark.usefixtures("settings_as_they_were")
WORDS = ["[PAD]", "[UNK]", *"abcdefgh", *(f"w{number}" for number in range(500))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the tokenizer `tok` and `x.txt`; the cache is `hf/pema`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_tokenizer("tok")
    (tmp_path / "x.txt").write_text("a b\nc\n")
    return tmp_path


def save_tokenizer(name, lowercase=False):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace() if lowercase else pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(name)


def scanned(capsys, *arguments, tokenizer="tok"):
    code = main(["--tokenizer", tokenizer, "--json", "--data", *(arguments or ["x.txt"])])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return json.loads(out)


def without_source(figures):
    return {key: value for key, value in figures.items() if key not in {"from_cache", "notes", "data", "tokenizer"}}


@pytest.fixture
def no_more_scans(monkeypatch):
    def forbid():
        monkeypatch.setattr(
            "pema_adapters.scanning.cache.cached_scan.scan_text", lambda *_, **__: pytest.fail("it was scanned")
        )

    return forbid


def entries(folder, kind):
    found = (folder / "hf" / "pema").glob(f"{kind}-*")
    return sorted(path for path in found if path.suffix != ".tmp")  # on its way


def test_a_second_scan_reads_the_cache(folder, capsys, no_more_scans):
    first = scanned(capsys)
    no_more_scans()
    second = scanned(capsys)
    assert (first["from_cache"], second["from_cache"]) == (False, True)
    assert without_source(first) == without_source(second)
    assert main(["--tokenizer", "tok", "--data", "x.txt"]) == 0
    note = f"the figures are those of an earlier scan of the same data, from {folder}/hf/pema; --no-cache scans again"
    assert capsys.readouterr().out.endswith(f"\n\nnote: {note}\n")


def test_files_are_identified_by_content(folder, capsys, no_more_scans):
    scanned(capsys)
    (folder / "x.txt").rename(folder / "y.txt")
    save_tokenizer("the-same")
    no_more_scans()
    assert scanned(capsys, "y.txt", tokenizer="the-same")["from_cache"]


OTHER = {
    "another text": ([], lambda: Path("x.txt").write_text("a b\nd\n")),
    "another length": (["--max-length", "1"], None),
    "a named column": (["--text-column", "text"], None),
    "another tokenizer": ([], lambda: save_tokenizer("tok", lowercase=True)),
    "more data": (["y.txt"], lambda: Path("y.txt").write_text("a b\nc\n")),
    "another kind of file": ([], lambda: Path("x.txt").rename("x.csv")),
    "no cache": (["--no-cache"], None),
}


@pytest.mark.filterwarnings("ignore:Exception ignored in.*sv:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("other", OTHER)
def test_other_options_need_another_scan(other, folder, capsys):
    scanned(capsys)
    arguments, change = OTHER[other]
    if change:
        change()
    assert not scanned(capsys, "x.csv" if Path("x.csv").exists() else "x.txt", *arguments)["from_cache"]


def test_folders_are_cached(folder, capsys):
    Dataset.from_dict({"input_ids": [[1, 2], [3]]}).save_to_disk("ids")
    capsys.readouterr()
    assert [scanned(capsys, "ids")["from_cache"] for _ in range(2)] == [False, True]
    Dataset.from_dict({"input_ids": [[1, 2], [4]]}).save_to_disk("more/ids")
    next(Path("more/ids").glob("*.arrow")).replace(next(Path("ids").glob("*.arrow")))
    capsys.readouterr()
    assert not scanned(capsys, "ids")["from_cache"]


def test_a_file_is_hashed_once(folder, capsys, monkeypatch):
    """But not one that is so new that it may change within a tick of its clock."""
    scanned(capsys)
    assert not entries(folder, "file")
    os.utime("x.txt", (time.time() - 60,) * 2)
    scanned(capsys)
    assert len(entries(folder, "file")) == 1
    monkeypatch.setattr(content_key, "sha256_file", lambda _: pytest.fail("it was read"))
    assert scanned(capsys)["from_cache"]


@pytest.mark.parametrize("kind", ["scan", "file"])
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"?", lambda _: b""])
def test_damaged_entries_are_rewritten(kind, damage, folder, capsys):
    os.utime("x.txt", (time.time() - 60,) * 2)
    first = scanned(capsys)
    (entry,) = entries(folder, kind)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    second = scanned(capsys)
    assert second["from_cache"] == (kind == "file")
    assert without_source(first) == without_source(second)
    assert entry.read_bytes() == whole


def test_data_that_change_during_a_scan_are_not_cached(folder, capsys, monkeypatch):
    real = scan_text

    def change_after(*arguments, **options):
        found = real(*arguments, **options)
        (folder / "x.txt").write_text("a b\nd\n")
        return found

    monkeypatch.setattr("pema_adapters.scanning.cache.cached_scan.scan_text", change_after)
    scanned(capsys)
    assert not entries(folder, "scan")


def test_an_unwritable_cache_is_ignored(folder, capsys):
    (folder / "hf").touch()
    assert [scanned(capsys)["from_cache"] for _ in range(2)] == [False, False]


def test_a_data_set_of_the_hub_is_cached(folder, hub, capsys, no_more_scans, monkeypatch):
    """The real client and a real server: splits by their names, and the second scan is none."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    hub.publish("someone/texts", {"train.jsonl": b'{"text": "a b"}\n{"text": "c"}\n', "test.jsonl": b'{"text": "d"}\n'})
    first = scanned(capsys, "someone/texts")
    assert (first["tokens"], first["partial_vocab_size"], first["from_cache"]) == (4, 4, False)
    no_more_scans()
    assert scanned(capsys, "someone/texts")["from_cache"]
    assert main(["--tokenizer", "tok", "--data", "someone/nothing"]) == 1
    assert "someone/nothing: cannot be read as a data set" in capsys.readouterr().err


def test_data_sets_of_the_hub_are_identified_by_fingerprint(folder):
    """What `load_dataset` gives lies in the cache of datasets, under a name that is no file here."""
    data, split = DataSource(("someone/texts",)), Dataset.from_dict({"text": ["a b"]})
    data.__dict__["loaded"] = {"someone/texts train": split}
    store = CacheFolder(folder / "store")
    assert data.compute_key(store) == [[["someone/texts train", split._fingerprint]]]
    data.__dict__["loaded"] = {"someone/texts train": split.to_iterable_dataset()}
    assert data.compute_key(store) is None


def test_tokenizers_in_python_are_identified_by_their_files(folder):
    """Known by what they save; classes from elsewhere are not known at all."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    (folder / "same.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (folder / "other.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "b"]))
    first, same, other = (BertTokenizer(f"{name}.txt") for name in ("vocab", "same", "other"))
    assert content_key.compute_tokenizer_key(first) == content_key.compute_tokenizer_key(same)
    assert content_key.compute_tokenizer_key(first) != content_key.compute_tokenizer_key(other)
    elsewhere = type("Other", (BertTokenizer,), {})("vocab.txt")
    assert content_key.compute_tokenizer_key(elsewhere) is None
    scans = [
        scan_with_cache(DataSource(("x.txt",)), Encoder(elsewhere), 9, num_proc=1, use_cache=True) for _ in range(2)
    ]
    assert [source for _, source in scans] == ["", ""]


# ---- interrupted


def start(folder, before):
    code = f"import sys; from pema_adapters.cli.scan import main; {before}\nsys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", code, "--tokenizer", "tok", "--data", "x.txt", "--json"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


SLOWLY = (
    "import time\n"
    "from pema_adapters.scanning.bitmap import GrowingBitmap as B; import pema_adapters.scanning.cache.scan_store as r\n"
    "mark = B.mark; r.SECONDS_BETWEEN_WRITES = 0.1\n"
    "B.mark = lambda *a, **b: (time.sleep(0.15), mark(*a, **b))[1]"
)


def make_long(folder):
    """40 batches, of which each brings new words."""
    lines = [f"w{number * 7 % 500} w{number % 90} w{number // 1000}" for number in range(40_000)]
    (folder / "x.txt").write_text("\n".join(lines))


@pytest.mark.slow
def test_a_killed_scan_is_resumed(folder, capsys):
    """Killed, so that nothing can be done at the last moment. After Ctrl-C: test_scan_outputs.py, test_text_scanner.py."""
    make_long(folder)
    whole = scanned(capsys, "x.txt", "--no-cache")
    process = start(folder, SLOWLY)
    deadline = time.monotonic() + 120
    while not entries(folder, "partial") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert process.communicate(timeout=60) == ("", "")
    assert len(entries(folder, "partial")) == 1
    rest = scanned(capsys)
    (note,) = rest["notes"]
    row = int(note.removeprefix("resumed an interrupted scan at row ").replace(",", ""))
    assert 0 < row < 40_000
    assert row % 1_000 == 0
    assert without_source(rest) == without_source(whole)
    assert not entries(folder, "partial")


def test_the_cache_is_in_hf_home(folder, capsys):
    assert str(folder / "hf") == constants.HF_HOME
    scanned(capsys)
    assert len(entries(folder, "scan")) == 1
