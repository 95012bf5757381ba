"""Small data sets as Arrow and Parquet files, and their mutations."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

V = 300
ROWS = 60
COLUMNS = ("list", "nulls", "large list", "fixed-size list", "nested", "Array2D")
WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 255, 1000)
LONG_WORDS = (0, 1, 2**62, 2**63, 2**64 - 1, 1000)


@dataclass(frozen=True)
class Source:
    """An undamaged data set: its file, the content, its ids, the bytes that nothing guards (ids, or Parquet pages)."""

    name: str
    folder: Path
    file: Path
    content: bytes
    ids: frozenset[int]
    unguarded: tuple[tuple[int, int], ...]


def rows_of(column: str) -> tuple[list[Any], Any]:
    """Return values of a column and their feature."""
    from datasets import Array2D, LargeList, List, Value

    random = Random(7)
    ragged = [[random.randrange(V) for _ in range(random.randrange(9))] for _ in range(ROWS)]
    squares = [[[random.randrange(V) for _ in range(2)] for _ in range(2)] for _ in range(ROWS)]
    missing = [
        None if i % 7 == 3 else [one if j % 5 else None for j, one in enumerate(row)] for i, row in enumerate(ragged)
    ]
    return {
        "list": (ragged, List(Value("int32"))),
        "nulls": (missing, List(Value("int64"))),
        "large list": (ragged, LargeList(Value("uint16"))),
        "fixed-size list": ([one for one, _ in squares], List(Value("int32"), length=2)),
        "nested": ([ragged[i : i + 2] for i in range(ROWS)], List(List(Value("int32")))),
        "Array2D": (squares, Array2D((2, 2), "int32")),
    }[column]


def write_sources(folder: Path) -> list[Source]:
    """Write a data set of each column in each format, in two batches."""
    import datasets

    sources = []
    for column in COLUMNS:
        values, feature = rows_of(column)
        features = datasets.Features({"input_ids": feature, "text": datasets.Value("string")})
        data = datasets.Dataset.from_dict({"input_ids": values, "text": ["a b"] * ROWS}, features=features)
        ids = frozenset(flatten(values))
        saved = folder / f"saved {column}"
        datasets.config.DEFAULT_MAX_BATCH_SIZE = ROWS // 2
        data.save_to_disk(saved)
        file = next(saved.glob("*.arrow"))
        sources.append(Source(f"Arrow, {column}", saved, file, file.read_bytes(), ids, arrow_values(file)))
        file = folder / f"parquet {column}" / "x.parquet"
        file.parent.mkdir()
        data.to_parquet(file, batch_size=ROWS // 2)
        sources.append(Source(f"Parquet, {column}", file, file, file.read_bytes(), ids, parquet_values(file)))
    return sources


def flatten(value: Any) -> list[int]:
    """Return all integers in nested lists, without None."""
    if isinstance(value, list):
        return [one for part in value for one in flatten(part)]
    return [] if value is None else [int(value)]


def arrow_values(file: Path) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the batches' bodies in an Arrow file, from the first buffer to the last of each."""
    import pyarrow as pa

    content = pa.py_buffer(file.read_bytes())
    read = pa.ipc.open_stream(content).read_all()
    ids, texts = (read.column(name).chunks for name in ("input_ids", "text"))
    firsts = [next(filter(None, _storage(chunk).buffers())) for chunk in ids]
    pairs = [(first, text.buffers()[-1]) for first, text in zip(firsts, texts, strict=True)]
    return tuple((a.address - content.address, b.address - content.address + b.size) for a, b in pairs)


def _storage(array: Any) -> Any:
    return getattr(array, "storage", array)


def parquet_values(file: Path) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the pages of all columns in a Parquet file, lengths and ids in one."""
    import pyarrow.parquet as pq

    groups = pq.ParquetFile(file).metadata
    chunks = [groups.row_group(i).column(j) for i in range(groups.num_row_groups) for j in range(groups.num_columns)]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    return tuple((start, start + chunk.total_compressed_size) for start, chunk in zip(starts, chunks, strict=True))


def damage(content: bytes, random: Random) -> tuple[str, bytes]:
    """Return the name of one mutation, and the mutated content."""
    changed, kind = bytearray(content), random.choice(("bit", "byte", "word", "long word", "stretch", "zeros", "cut"))
    at = random.randrange(len(content) - 16)
    if kind == "bit":
        changed[at] ^= 1 << random.randrange(8)
    elif kind == "byte":
        changed[at] = random.choice((0, 1, 127, 128, 255))
    elif kind == "word":
        at -= at % 4
        changed[at : at + 4] = random.choice((*WORDS, random.randrange(3000))).to_bytes(4, "little")
    elif kind == "long word":
        at -= at % 8
        changed[at : at + 8] = random.choice((*LONG_WORDS, random.randrange(3000))).to_bytes(8, "little")
    elif kind == "stretch":
        source = random.randrange(len(content) - 16)
        changed[at : at + 16] = content[source : source + 16]
    elif kind == "zeros":
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    else:
        del changed[at:]
    return f"{kind} at {at}", bytes(changed)


def is_unguarded(source: Source, content: bytes) -> bool:
    """Whether no checksum guards any of the changed bytes."""
    changed = [i for i, (old, new) in enumerate(zip(source.content, content, strict=False)) if old != new]
    spans = source.unguarded
    return len(content) == len(source.content) and all(any(a <= i < b for a, b in spans) for i in changed)


def read_by_arrow(source: Source) -> frozenset[int]:
    """Return the ids that Arrow itself reads, slowly."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source.file.suffix == ".parquet":
        found = pq.read_table(source.file)
    else:
        found = pa.ipc.open_stream(source.file.read_bytes()).read_all()
    if "input_ids" not in found.column_names:  # its name is damaged, and the command tokenizes the text beside it
        return frozenset({0})
    found.column("input_ids").validate(full=True)
    return frozenset(flatten([_storage(chunk).to_pylist() for chunk in found.column("input_ids").chunks]))
