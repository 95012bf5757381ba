"""Refuse data files that would exhaust memory or time, before `datasets` reads them.

Each file is read once more for that, decompressed, in chunks of 1 MiB; tokenizing it takes far longer.
"""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError

CHUNK = 1 << 20  # bytes per read
MAX_LINE = 1 << 26  # bytes per line of text, which is tokenized as a whole
MAX_JSON_LINE = 1 << 28  # bytes per line of JSON, which may be the whole file
MAX_JSON_DEPTH = 200  # nested brackets; the parser is recursive
MAX_COLUMNS = 10_000  # parsing time is quadratic in them
MAX_VALUES = 1 << 30  # per column and row group of Parquet, where a few bytes can encode them all
MAX_EXPANSION = 1_000  # compression ratio of a column of a row group; checked beyond MAX_PAGES bytes
MAX_PAGES = 1 << 30

_GZIP = b"\x1f\x8b"
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_DEPTH_STEPS = np.zeros(256, dtype=np.int64)
_DEPTH_STEPS[[*b"[{"]], _DEPTH_STEPS[[*b"]}"]] = 1, -1


def check_limits(path: Path, suffix: str) -> None:
    """Refuse a data file that exceeds one of the limits above.

    Args:
        path: the file.
        suffix: its format, a key of `data_files.BUILDERS`.

    Raises:
        FormatError: a limit is exceeded.
    """
    if suffix == ".parquet":
        _check_parquet(path)
        return
    is_json = suffix in (".json", ".jsonl")
    checks = [_make_line_check(path, MAX_JSON_LINE if is_json else MAX_LINE)]
    if is_json:
        checks.append(_make_depth_check(path))
    elif suffix in (".csv", ".tsv"):
        checks.append(_make_column_check(path, b"\t" if suffix == ".tsv" else b","))
    for chunk in _read_chunks(path):
        for check in checks:
            check(chunk)


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        is_compressed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        content: Any = gzip.GzipFile(fileobj=file) if is_compressed else file
        while chunk := content.read(CHUNK):
            yield chunk


def _make_line_check(path: Path, limit: int) -> Callable[[bytes], None]:
    """Return a check that counts the bytes since the last line break."""
    length = 0

    def check(chunk: bytes) -> None:
        nonlocal length
        breaks = [at for at in (chunk.find(b"\n"), chunk.find(b"\r")) if at >= 0]
        length += min(breaks, default=len(chunk))
        if length > limit:
            raise FormatError(
                f"{path}: a line of more than {limit:,} bytes; break the text into lines (fold -s), write JSON with "
                "a row on each line"
            )
        if breaks:
            length = len(chunk) - 1 - max(chunk.rfind(b"\n"), chunk.rfind(b"\r"))

    return check


def _make_depth_check(path: Path) -> Callable[[bytes], None]:
    """Return a check that counts open brackets outside of strings."""
    depth, quotes, rest = 0, 0, b""

    def check(chunk: bytes) -> None:
        nonlocal depth, quotes, rest
        text = rest + chunk
        cut = (len(text) - len(text.rstrip(b"\\"))) % 2  # the chunk may end within an escape
        rest = text[len(text) - cut :]
        text = text[: len(text) - cut].replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NOT_STRUCTURE)
        marks = np.frombuffer(text, dtype=np.uint8)
        before = quotes + np.cumsum(marks == ord('"'))
        depths = depth + np.cumsum(np.where(before % 2, 0, _DEPTH_STEPS[marks]))
        if not len(marks):
            return
        if int(depths.max()) > MAX_JSON_DEPTH:
            raise FormatError(f"{path}: JSON nested more than {MAX_JSON_DEPTH} deep; expected rows with fields of text")
        depth, quotes = int(depths[-1]), int(before[-1]) % 2

    return check


def _make_column_check(path: Path, separator: bytes) -> Callable[[bytes], None]:
    """Return a check that counts the separators of the first line."""
    found, is_over = 1, False

    def check(chunk: bytes) -> None:
        nonlocal found, is_over
        if is_over:
            return
        line, end, _ = chunk.partition(b"\n")
        found, is_over = found + line.count(separator), bool(end)
        if found > MAX_COLUMNS:
            _refuse_columns(path, found if is_over else found + 1)

    return check


def _refuse_columns(path: Path, found: int) -> None:
    raise FormatError(
        f"{path}: {found:,} columns or more, expected at most {MAX_COLUMNS:,}; write the columns of text to a file of "
        "their own"
    )


def _check_parquet(path: Path) -> None:
    """Check the sizes in the footer of a Parquet file, and that its row counts agree."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        footer = file.metadata
    if footer.num_columns > MAX_COLUMNS:
        _refuse_columns(path, footer.num_columns)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    if (rows := sum(group.num_rows for group in groups)) != footer.num_rows:
        raise FormatError(
            f"{path}: damaged: the footer counts {footer.num_rows:,} rows, its row groups {rows:,}; write it again"
        )
    for number, group in enumerate(groups):
        for column in map(group.column, range(group.num_columns)):
            _check_column_chunk(f"{path}, row group {number}, column {column.path_in_schema!r}", column)


def _check_column_chunk(where: str, column: Any) -> None:
    size, expanded = column.total_compressed_size, column.total_uncompressed_size
    if column.num_values > MAX_VALUES:
        raise FormatError(
            f"{where}: {column.num_values:,} values, expected at most {MAX_VALUES:,}; write smaller row groups"
        )
    if expanded > max(MAX_PAGES, MAX_EXPANSION * size):
        raise FormatError(
            f"{where}: {size:,} bytes that expand to {expanded:,}, expected at most {MAX_EXPANSION:,} times as many; "
            "write the file again, without compression"
        )
