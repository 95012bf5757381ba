"""Data files are read as they are written."""

import pytest

from pema_adapters.reading.files import load_data

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves files open


def rows(path):
    (data,) = load_data([str(path)]).values()
    return list(data)


def test_tsv_has_no_quotes(tmp_path):
    (tmp_path / "x.tsv").write_text('text\tlabel\na "b\t0\nnull\t1\n"c\t0\n')
    assert [row["text"] for row in rows(tmp_path / "x.tsv")] == ['a "b', "null", '"c']


def test_csv_has_quotes_and_no_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text('text,label\n"a, b",0\nNA,1\n')
    assert [row["text"] for row in rows(tmp_path / "x.csv")] == ["a, b", "NA"]
