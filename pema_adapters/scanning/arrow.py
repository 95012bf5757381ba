"""Integers out of Arrow columns: the buffers themselves where Arrow can lend them, bounded copies elsewhere.

Imported only once data made by `datasets` are at hand, so pyarrow is loaded already.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

ROWS = 10_000  # rows copied at a time, where rows are missing or picked one by one
PIECE = 1 << 23  # bytes read at a time, about
PART = 1 << 25  # bytes for a thread at a time, about

Integers = npt.NDArray[np.integer[Any]]


def is_integers(kind: pa.DataType) -> bool:
    """Whether a column of this type holds integers (or nothing but nulls), in lists of any kind and depth."""
    if isinstance(kind, pa.BaseExtensionType):  # datasets' Array2D and the like
        return is_integers(kind.storage_type)
    if _is_list(kind):
        return is_integers(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_null(kind))


def integers(array: pa.Array) -> Iterator[Integers]:
    """All integers of an `is_integers` array in order, 1-D, nulls of any level left out."""
    if isinstance(array, pa.ExtensionArray):
        yield from integers(array.storage)
    elif _is_list(array.type):
        for part in _bounded(array):
            yield from integers(part.flatten())
    elif pa.types.is_integer(array.type):
        for part in _bounded(array):
            yield (part.drop_null() if part.null_count else part).to_numpy(zero_copy_only=True)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _bounded(array: pa.Array) -> Iterator[pa.Array]:
    """The array itself, or its slices where leaving nulls out makes a copy."""
    step = ROWS if array.null_count else max(len(array), 1)
    return (array.slice(start, step) for start in range(0, len(array), step))


@dataclass(frozen=True)
class Piece:
    """Rows of a column; `rows` are their positions in the table, int64, or the first of a run."""

    array: pa.Array
    rows: Any

    def row_of(self, position: int) -> int:
        """Where in the table a row of the piece is."""
        return int(self.rows + position if isinstance(self.rows, int) else self.rows[position])


def pieces(column: pa.ChunkedArray, picked: npt.NDArray[np.bool_] | None) -> Iterator[Piece]:
    """The chunks of a column, or what a mask over all its rows picks of them; large ones in slices."""
    first = 0
    for chunk in column.chunks:
        mask = None if picked is None else picked[first : first + len(chunk)]
        if mask is None or mask.all():
            yield from _slices(chunk, first)
        elif mask.any():
            yield from _picked_rows(chunk, mask, first)
        first += len(chunk)


def _slices(chunk: pa.Array, first: int) -> Iterator[Piece]:
    rows = max(1, len(chunk) * PIECE // max(chunk.nbytes, PIECE))
    return (Piece(chunk.slice(start, rows), first + start) for start in range(0, len(chunk), rows))


def parts(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in order, in lists of about PART bytes."""
    found: list[Piece] = []
    size = 0
    for piece in pieces:
        found.append(piece)
        size += piece.array.nbytes
        if size >= PART:
            yield found
            found, size = [], 0
    if found:
        yield found


def count(array: pa.Array) -> int:
    """How many integers there are in an `is_integers` array; free where none is missing."""
    return sum(map(len, integers(array)))


def _picked_rows(chunk: pa.Array, mask: npt.NDArray[np.bool_], first: int) -> Iterator[Piece]:
    chunk = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
    for start in range(0, len(chunk), ROWS):
        part = mask[start : start + ROWS]
        rows = np.flatnonzero(part) + (first + start)
        yield Piece(chunk.slice(start, ROWS).filter(pa.array(part)), rows)


def picked_rows(indices: pa.ChunkedArray | None, row_count: int) -> npt.NDArray[np.bool_] | None:
    """A mask [row_count] of the rows that an indices mapping picks; None for all of them."""
    if indices is None:
        return None
    mask = np.zeros(row_count, dtype=np.bool_)
    for chunk in indices.chunks:
        mask[chunk.to_numpy()] = True
    return None if mask.all() else mask


def picked_as(indices: pa.ChunkedArray | None, row: int) -> int:
    """The number that the user knows a row of the table by: where the indices mapping first picks it."""
    return row if indices is None else int(np.flatnonzero(indices.to_numpy() == row)[0])


def first_row(array: pa.Array, is_wrong: Callable[[pa.Array], bool]) -> int:
    """Position of the first wrong row, by bisection; one of them must be wrong."""
    low, high = 0, len(array)
    while high - low > 1:
        middle = (low + high) // 2
        if is_wrong(array.slice(low, middle - low)):
            high = middle
        else:
            low = middle
    return low
