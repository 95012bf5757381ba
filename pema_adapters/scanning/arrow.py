"""Integers out of Arrow columns: the buffers themselves where Arrow can lend them, bounded copies elsewhere.

Imported only once data made by `datasets` are at hand, so pyarrow is loaded already.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

COPY_ROWS = 10_000  # rows copied at a time, where rows are missing or picked one by one
SLICE_BYTES = 1 << 23  # bytes read at a time, about
GROUP_BYTES = 1 << 25  # bytes for a thread at a time, about

Integers = npt.NDArray[np.integer[Any]]


def is_integer_type(kind: pa.DataType) -> bool:
    """Whether a column of this type holds integers (or nothing but nulls), in lists of any kind and depth."""
    if isinstance(kind, pa.BaseExtensionType):  # datasets' Array2D and the like
        return is_integer_type(kind.storage_type)
    if _is_list(kind):
        return is_integer_type(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_null(kind))


def iterate_integers(array: pa.Array) -> Iterator[Integers]:
    """All integers of an `is_integers` array in order, 1-D, nulls of any level left out."""
    if isinstance(array, pa.ExtensionArray):
        yield from iterate_integers(array.storage)
    elif _is_list(array.type):
        for part in _iterate_bounded(array):
            yield from iterate_integers(part.flatten())
    elif pa.types.is_integer(array.type):
        for part in _iterate_bounded(array):
            yield (part.drop_null() if part.null_count else part).to_numpy(zero_copy_only=True)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _iterate_bounded(array: pa.Array) -> Iterator[pa.Array]:
    """The array itself, or its slices where leaving nulls out makes a copy."""
    step = COPY_ROWS if array.null_count else max(len(array), 1)
    return (array.slice(start, step) for start in range(0, len(array), step))


@dataclass(frozen=True)
class ColumnSlice:
    """Rows of a column; `rows` are their positions in the table, int64, or the first of a run."""

    array: pa.Array
    rows: Any

    def table_row(self, position: int) -> int:
        """Where in the table a row of the piece is."""
        return int(self.rows + position if isinstance(self.rows, int) else self.rows[position])


def iterate_slices(column: pa.ChunkedArray, picked: npt.NDArray[np.bool_] | None) -> Iterator[ColumnSlice]:
    """The chunks of a column, or what a mask over all its rows picks of them; large ones in slices."""
    first = 0
    for chunk in column.chunks:
        mask = None if picked is None else picked[first : first + len(chunk)]
        if mask is None or mask.all():
            yield from _split_chunk(chunk, first)
        elif mask.any():
            yield from _filter_chunk(chunk, mask, first)
        first += len(chunk)


def _split_chunk(chunk: pa.Array, first: int) -> Iterator[ColumnSlice]:
    rows = max(1, len(chunk) * SLICE_BYTES // max(chunk.nbytes, SLICE_BYTES))
    return (ColumnSlice(chunk.slice(start, rows), first + start) for start in range(0, len(chunk), rows))


def group_slices(pieces: Iterable[ColumnSlice]) -> Iterator[list[ColumnSlice]]:
    """Pieces in order, in lists of about PART bytes."""
    found: list[ColumnSlice] = []
    size = 0
    for piece in pieces:
        found.append(piece)
        size += piece.array.nbytes
        if size >= GROUP_BYTES:
            yield found
            found, size = [], 0
    if found:
        yield found


def count_integers(array: pa.Array) -> int:
    """How many integers there are in an `is_integers` array; free where none is missing."""
    return sum(map(len, iterate_integers(array)))


def _filter_chunk(chunk: pa.Array, mask: npt.NDArray[np.bool_], first: int) -> Iterator[ColumnSlice]:
    chunk = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
    for start in range(0, len(chunk), COPY_ROWS):
        part = mask[start : start + COPY_ROWS]
        rows = np.flatnonzero(part) + (first + start)
        yield ColumnSlice(chunk.slice(start, COPY_ROWS).filter(pa.array(part)), rows)


def build_row_mask(indices: pa.ChunkedArray | None, row_count: int) -> npt.NDArray[np.bool_] | None:
    """A mask [row_count] of the rows that an indices mapping picks; None for all of them."""
    if indices is None:
        return None
    mask = np.zeros(row_count, dtype=np.bool_)
    for chunk in indices.chunks:
        mask[chunk.to_numpy()] = True
    return None if mask.all() else mask


def find_dataset_row(indices: pa.ChunkedArray | None, row: int) -> int:
    """The number that the user knows a row of the table by: where the indices mapping first picks it."""
    return row if indices is None else int(np.flatnonzero(indices.to_numpy() == row)[0])


def find_first_invalid_row(array: pa.Array, is_wrong: Callable[[pa.Array], bool]) -> int:
    """Position of the first wrong row, by bisection; one of them must be wrong."""
    low, high = 0, len(array)
    while high - low > 1:
        middle = (low + high) // 2
        if is_wrong(array.slice(low, middle - low)):
            high = middle
        else:
            low = middle
    return low
