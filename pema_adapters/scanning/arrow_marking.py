"""Mark the ids of Arrow columns in a bitmap, on one thread or several.

Imported only after `datasets` has loaded pyarrow.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from pema_adapters.scanning.arrow import (
    ColumnSlice,
    count_integers,
    find_first_invalid_row,
    group_slices,
    iterate_integers,
)
from pema_adapters.scanning.bitmap import Bitmap


@dataclass(frozen=True)
class InvalidId:
    """The first id of a column that is outside [0, V), and its row in the table."""

    token_id: int
    table_row: int


@dataclass(frozen=True)
class MarkedSlices:
    """Slices of a column that are in the bitmap, up to the first invalid id."""

    slices: list[ColumnSlice]
    invalid: InvalidId | None

    @property
    def row_count(self) -> int:
        """Rows of the slices."""
        return sum(len(one.array) for one in self.slices)


@dataclass(frozen=True)
class _Pending:
    """Slices that a thread marks in a bitmap of their own; `tokens` ids at most."""

    bitmap: Bitmap
    tokens: int
    marked: Future[MarkedSlices]


def mark_slices(
    bitmap: Bitmap, slices: Iterable[ColumnSlice], *, skip_negative: bool, num_proc: int
) -> Iterator[MarkedSlices]:
    """Mark the slices of a column.

    Args:
        bitmap: where to mark the ids.
        slices: of one column, in order.
        skip_negative: skip negative ids, as in labels; otherwise they are invalid.
        num_proc: the number of threads. They run in parallel, because NumPy releases the GIL.

    Yields:
        Marked slices in order, a few at a time. Stop at the first invalid id.
    """
    if num_proc == 1:
        for one in slices:
            yield _mark_group(bitmap, [one], skip_negative)
        return
    with ThreadPoolExecutor(num_proc) as pool:
        pending: deque[_Pending] = deque()
        for group in group_slices(slices):
            if len(pending) == 2 * num_proc:
                yield _merge(bitmap, pending.popleft())
            fork = bitmap.fork(sum(one.tokens for one in pending))
            tokens = sum(count_integers(one.array) for one in group)
            pending.append(_Pending(fork, tokens, pool.submit(_mark_group, fork, group, skip_negative)))
        while pending:
            yield _merge(bitmap, pending.popleft())


def _merge(bitmap: Bitmap, pending: _Pending) -> MarkedSlices:
    marked = pending.marked.result()
    bitmap.merge(pending.bitmap)
    return marked


def _mark_group(bitmap: Bitmap, slices: list[ColumnSlice], skip_negative: bool) -> MarkedSlices:
    for one in slices:
        if (token_id := _mark_array(bitmap, one.array, skip_negative)) is not None:
            row = find_first_invalid_row(one.array, lambda part: _mark_array(bitmap, part, skip_negative) is not None)
            return MarkedSlices(slices, InvalidId(token_id, one.table_row(row)))
    return MarkedSlices(slices, None)


def _mark_array(bitmap: Bitmap, array: pa.Array, skip_negative: bool) -> int | None:
    for ids in iterate_integers(array):
        if (token_id := bitmap.mark(ids, skip_negative)) is not None:
            return token_id
    return None
