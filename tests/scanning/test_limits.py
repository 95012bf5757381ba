"""Data files that would exhaust memory or time are refused in one line, in little memory."""

import gzip
import json
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pema_adapters.errors import FormatError
from pema_adapters.scanning import limits
from pema_adapters.scanning.data_files import load_data


def rows_of(path):
    return [row for data in load_data([str(path)]).values() for row in data]


def write_values(path, count):
    """Write Parquet that encodes `count` values in a few bytes."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array(["a" * 1_000]))
    pq.write_table(pa.table({"text": column}), path)


REFUSED = {
    "a long line": (
        "x.txt.gz", lambda path: path.write_bytes(gzip.compress(b"a\n" + b"x" * 5_001)),
        ("MAX_LINE", 5_000), "a line of more than 5,000 bytes; break the text into lines (fold -s)",
    ),
    "a long row of JSON": (
        "x.jsonl", lambda path: path.write_text(json.dumps({"text": "x" * 5_000})),
        ("MAX_JSON_LINE", 5_000), "a line of more than 5,000 bytes; break the text into lines (fold -s), write JSON",
    ),
    "deep JSON": (
        "x.json", lambda path: path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        None, "JSON nested more than 200 deep",
    ),
    "many columns": (
        "x.csv", lambda path: path.write_text(",".join(f"c{i}" for i in range(100_000)) + "\n" + "1," * 99_999 + "1\n"),
        None, " columns or more, expected at most 10,000; write the columns of text to a file",
    ),
    "many columns of Parquet": (
        "x.parquet", lambda path: pq.write_table(pa.table({f"c{i}": ["a"] for i in range(12)}), path),
        ("MAX_COLUMNS", 11), "12 columns or more, expected at most 11",
    ),
    "many values": (
        "x.parquet", lambda path: write_values(path, 5_001),
        ("MAX_VALUES", 5_000), "x.parquet, row group 0, column 'text': 5,001 values, expected at most 5,000",
    ),
    "pages that expand": (
        "x.parquet",
        lambda path: pq.write_table(pa.table({"text": ["x" * 5_000_000]}), path, compression="zstd", use_dictionary=False),
        ("MAX_PAGES", 5_000), "bytes that expand to 5,000,0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_files_beyond_a_limit_are_refused(kind, tmp_path, monkeypatch):
    name, write, limit, message = REFUSED[kind]
    write(tmp_path / name)
    monkeypatch.setattr(limits, "CHUNK", 1_000)
    if limit is not None:
        monkeypatch.setattr(limits, *limit)
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        load_data([str(tmp_path / name)])
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


BRACKETS = ["[" * 500, "\\" * 3 + '"' + "{" * 500, '\\"[{', "plain", "]" * 500]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_brackets_in_strings_do_not_count(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "CHUNK", chunk)
    rows = [{"text": text, "more": [[text]]} for text in BRACKETS]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert rows_of(tmp_path / "x.jsonl") == rows


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n"])
def test_lines_up_to_the_limit_are_read(line_break, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_LINE", 10)
    monkeypatch.setattr(limits, "CHUNK", 3)
    (tmp_path / "x.txt").write_bytes(line_break.join(["a" * 10, "", "b" * 10, "c"]).encode())
    assert len(rows_of(tmp_path / "x.txt")) == 4


def test_a_footer_with_contradicting_row_counts_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100}), path)
    content = path.read_bytes()
    rows = content.index(b"\x16\xc8\x01\x19")  # 100 as Thrift writes it, and the list of row groups
    path.write_bytes(content[:rows] + b"\x16\xca\x01\x19" + content[rows + 4 :])
    with pytest.raises(FormatError, match="damaged: the footer counts 101 rows, its row groups 100"):
        load_data([str(path)])


def test_a_huge_line_is_refused_in_little_memory(tmp_path):
    """200 MB in one line, compressed to 200 kB, with 100 MiB of address space to read it."""
    with gzip.open(tmp_path / "x.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(b"x" * 1_000_000)
    code = (
        "import resource, datasets\n"
        "from pema_adapters.errors import FormatError\n"
        "from pema_adapters.scanning.data_files import load_data\n"
        "used = next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if line.startswith('VmSize'))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)\n"
        f"try: load_data([{str(tmp_path / 'x.txt.gz')!r}])\n"
        "except FormatError as error: assert 'a line of more than 67,108,864 bytes' in str(error), error\n"
        "else: raise SystemExit('was read')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
