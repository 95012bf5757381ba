"""Read integers from Arrow columns without a copy where Arrow allows it, and with bounded copies elsewhere.

Imported only after `datasets` has loaded pyarrow.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pema_adapters.scanning.values import Integers

COPY_ROWS = 10_000  # rows per copy, where nulls are dropped or rows are filtered
SLICE_BYTES = 1 << 23  # approximate size of a slice
GROUP_BYTES = 1 << 25  # approximate size of the slices that one thread marks at a time

RowMask = npt.NDArray[np.bool_]  # [rows of the table], the rows to read


def is_integer_type(data_type: pa.DataType) -> bool:
    """Tell whether a column of this type holds integers (or only nulls), in lists of any kind and depth."""
    if isinstance(data_type, pa.BaseExtensionType):  # for example, datasets' Array2D
        return is_integer_type(data_type.storage_type)
    if _is_list(data_type):
        return is_integer_type(data_type.value_type)
    return bool(pa.types.is_integer(data_type) or pa.types.is_null(data_type))


def iterate_integers(array: pa.Array) -> Iterator[Integers]:
    """Iterate over all integers of an `is_integer_type` array in order, as [n] arrays; nulls are skipped."""
    if isinstance(array, pa.ExtensionArray):
        yield from iterate_integers(array.storage)
    elif _is_list(array.type):
        for part in _iterate_bounded(array):
            yield from iterate_integers(part.flatten())
    elif pa.types.is_integer(array.type):
        for part in _iterate_bounded(array):
            yield (part.drop_null() if part.null_count else part).to_numpy(zero_copy_only=True)


def count_integers(array: pa.Array) -> int:
    """Count the integers of an `is_integer_type` array; copies only where there are nulls."""
    return sum(map(len, iterate_integers(array)))


def _is_list(data_type: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(data_type) or types.is_large_list(data_type) or types.is_fixed_size_list(data_type))


def _iterate_bounded(array: pa.Array) -> Iterator[pa.Array]:
    """Yield the array itself, or slices of bounded size where dropping nulls copies."""
    step = COPY_ROWS if array.null_count else max(len(array), 1)
    return (array.slice(start, step) for start in range(0, len(array), step))


@dataclass(frozen=True)
class ColumnSlice:
    """Rows of a column.

    Attributes:
        array: the values.
        rows: the rows of the table, int64 [n]; an int stands for the first of n consecutive ones.
    """

    array: pa.Array
    rows: int | npt.NDArray[np.int64]

    def table_row(self, position: int) -> int:
        """Return the row of the table at a position of the slice."""
        return int(self.rows + position if isinstance(self.rows, int) else self.rows[position])


def iterate_slices(column: pa.ChunkedArray, mask: RowMask | None) -> Iterator[ColumnSlice]:
    """Iterate over a column, or the rows that a mask selects, in slices of about SLICE_BYTES."""
    first = 0
    for chunk in column.chunks:
        chunk_mask = None if mask is None else mask[first : first + len(chunk)]
        if chunk_mask is None or chunk_mask.all():
            yield from _split_chunk(chunk, first)
        elif chunk_mask.any():
            yield from _filter_chunk(chunk, chunk_mask, first)
        first += len(chunk)


def _split_chunk(chunk: pa.Array, first: int) -> Iterator[ColumnSlice]:
    rows = max(1, len(chunk) * SLICE_BYTES // max(chunk.nbytes, SLICE_BYTES))
    return (ColumnSlice(chunk.slice(start, rows), first + start) for start in range(0, len(chunk), rows))


def _filter_chunk(chunk: pa.Array, mask: RowMask, first: int) -> Iterator[ColumnSlice]:
    chunk = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
    for start in range(0, len(chunk), COPY_ROWS):
        part = mask[start : start + COPY_ROWS]
        rows = np.flatnonzero(part) + (first + start)
        yield ColumnSlice(chunk.slice(start, COPY_ROWS).filter(pa.array(part)), rows)


def group_slices(slices: Iterable[ColumnSlice]) -> Iterator[list[ColumnSlice]]:
    """Group slices, in order, into lists of about GROUP_BYTES."""
    group: list[ColumnSlice] = []
    size = 0
    for one in slices:
        group.append(one)
        size += one.array.nbytes
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def build_row_mask(indices: pa.ChunkedArray | None, row_count: int) -> RowMask | None:
    """Return the mask [row_count] of the rows that an indices mapping picks; None if it picks all."""
    if indices is None:
        return None
    mask = np.zeros(row_count, dtype=np.bool_)
    for chunk in indices.chunks:
        mask[chunk.to_numpy()] = True
    return None if mask.all() else mask


def find_dataset_row(indices: pa.ChunkedArray | None, table_row: int) -> int:
    """Return the row of the data set that first picks a row of the table."""
    return table_row if indices is None else int(np.flatnonzero(indices.to_numpy() == table_row)[0])


def find_first_invalid_row(array: pa.Array, is_invalid: Callable[[pa.Array], bool]) -> int:
    """Return the position of the first invalid row, by bisection; the array must have one."""
    low, high = 0, len(array)
    while high - low > 1:
        middle = (low + high) // 2
        if is_invalid(array.slice(low, middle - low)):
            high = middle
        else:
            low = middle
    return low
