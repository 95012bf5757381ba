"""Data files and folders of every format are read as they were written."""

import gzip

import pytest
from datasets import Dataset, DatasetDict

from pema_adapters.errors import FormatError
from pema_adapters.scanning.data_files import load_data
from pema_adapters.scanning.text_columns import Encoder
from pema_adapters.scanning.text_scanner import scan_text
from tests.words import WORDS, Words

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves files open


def rows(path):
    return [row for data in load_data([str(path)]).values() for row in data]


def test_tsv_is_read_without_quoting(tmp_path):
    (tmp_path / "x.tsv").write_text('text\tlabel\na "b\t0\nnull\t1\n"c\t0\n')
    assert [row["text"] for row in rows(tmp_path / "x.tsv")] == ['a "b', "null", '"c']


def test_csv_is_read_with_quoting_and_without_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text('text,label\n"a, b",0\nNA,1\n')
    assert [row["text"] for row in rows(tmp_path / "x.csv")] == ["a, b", "NA"]


def test_a_folder_is_read_file_by_file(tmp_path):
    """Every format, at any depth; hidden files and descriptions of data are skipped."""
    (tmp_path / "below" / ".git").mkdir(parents=True)
    (tmp_path / "a.csv").write_text('text,label\n"a, b",0\nNA,1\n')
    (tmp_path / "b.TSV").write_text('premise\tlabel\n"c\t0\n')
    (tmp_path / "below" / "extra.txt.gz").write_bytes(gzip.compress(b"d\n"))
    (tmp_path / "below" / "round").symlink_to(tmp_path, target_is_directory=True)
    Dataset.from_dict({"text": ["e"]}).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_dict({"text": ["f"]})}).save_to_disk(tmp_path / "splits")
    for name in ("below/.git/config.txt", "README.md", "dataset_infos.json"):
        (tmp_path / name).write_text("{}")
    found = load_data([str(tmp_path)])
    names = ["a.csv", "b.TSV", "below/extra.txt.gz", "saved", "splits train"]
    assert list(found) == [str(tmp_path / name) for name in names]
    texts = [value for data in found.values() for row in data for value in row.values() if isinstance(value, str)]
    assert texts == ["a, b", "NA", '"c', "d", "e", "f"]


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(FormatError, match=r"a folder without data; expected \.txt, .* or a save_to_disk folder"):
        load_data([str(tmp_path)])


@pytest.mark.parametrize("name", ["data[1].txt", "da*.txt", "d?ta1.txt", "folder[1]/x.txt"])
def test_glob_characters_in_names_are_literal(name, tmp_path):
    for other in ("data1.txt", "folder1/x.txt", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(f"{other}\n")
    assert rows(tmp_path / name) == [{"text": name}]


def test_names_with_two_colons_are_refused(tmp_path):
    (tmp_path / "a::b.txt").write_text("a\n")
    with pytest.raises(FormatError, match="rename the file"):
        rows(tmp_path / "a::b.txt")


@pytest.mark.parametrize("name", ["x.txt", "x.json", "x.jsonl", "x.csv", "x.tsv", "x.jsonl.gz"])
def test_files_without_rows_are_empty(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert rows(tmp_path / name) == []


def test_a_saved_split_without_rows_is_refused(tmp_path):
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(FormatError, match="saved: a saved data set with a split without rows"):
        rows(tmp_path / "saved")


def test_damaged_gzip_is_refused(tmp_path):
    whole = gzip.compress(b"".join(b"%d %d\n" % (number, number**5) for number in range(20_000)))
    for content in (whole[:-9000], whole[:5000] + b"\xff" * 500 + whole[5500:]):
        (tmp_path / "x.txt.gz").write_bytes(content)
        with pytest.raises(FormatError, match=r"x\.txt\.gz: cannot be read as a data set"):
            scan_text(load_data([str(tmp_path / "x.txt.gz")]), Encoder(Words()), vocab_size=len(WORDS))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model-00001-of-00002.bin", "tokenizer_config.json"])
def test_the_folder_of_a_model_is_refused(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(FormatError, match=r"the folder of a model or tokenizer; expected data: \.txt, "):
        load_data([str(tmp_path)])
