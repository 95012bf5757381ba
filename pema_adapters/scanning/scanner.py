"""Reading token ids out of any kind of data: one bit for each of the V rows, one pass, flat memory.

    scan(tokenized, vocab_size=250_002).token_ids

`datasets.Dataset`s are read in their Arrow buffers, without a copy; all else is read row by row. Text: text_scan.py.
"""

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from operator import add
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pema_adapters.errors import VocabularyError
from pema_adapters.scanning.bitmap import Bitmap
from pema_adapters.scanning.iteration import (
    estimate_length,
    is_instance_of,
    is_iterable,
    iterate,
    preserve_random_state,
)
from pema_adapters.scanning.progress import ScanProgress, open_scan_bar
from pema_adapters.scanning.validation import DEFAULT_COLUMNS, validate_num_proc, validate_vocab_size
from pema_adapters.scanning.values import NotIdsError, iterate_integers

BATCH_ROWS = 1_000  # rows asked for at a time, where a transform or a stream makes them

InvalidId = tuple[Any, int] | None  # the first piece that does not fit, and its id
Location = tuple[str, ...]  # the way from the caller's data to a part of it, e.g. ("data[1]", "split 'train'")


@dataclass(frozen=True)
class Scan:
    """What was found: the ids of K rows, increasing; the number of tokens read; the columns they came from.

    growth: of text, the vocabulary's growth, as in the paper's figure 2: pairs (tokens read, distinct ids among them),
    about ten for each power of ten, the last one (tokens, K).
    notes: what whoever asked for it should know of how it was done.
    """

    token_ids: npt.NDArray[np.intp]
    tokens: int
    columns: tuple[str, ...]
    growth: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()


def scan(  # noqa: PLR0913 - the settings of one call, by name
    data: Any,
    *,
    vocab_size: int,
    columns: Collection[str] = DEFAULT_COLUMNS,
    optional: Collection[str] = (),
    progress: bool | None = None,
    num_proc: int = 1,
) -> Scan:
    """Scan tokenized data; arguments and errors are those of `PartialVocabulary.from_dataset`.

    Rows that a data set picks more than once (through its indices mapping) are read and counted once.
    """
    columns = (columns,) if isinstance(columns, str) else tuple(columns)
    bitmap = Bitmap(validate_vocab_size(vocab_size))
    with open_scan_bar(estimate_length(data), progress) as bar, preserve_random_state(data):
        scanner = Scanner(bitmap, columns, ScanProgress(bitmap, bar), validate_num_proc(num_proc))
        scanner.scan_any(data, ())
        scanner.progress.finish()
    for note in scanner.notes:
        warnings.warn(note, stacklevel=3)  # at the caller of PartialVocabulary.from_dataset
    return scanner.build_result(optional)


@dataclass
class Scanner:
    """Walks any data down to integers and marks them; remembers which columns there were."""

    bitmap: Bitmap
    columns: tuple[str, ...]
    progress: ScanProgress
    num_proc: int = 1
    notes: dict[str, None] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)
    present: dict[str, None] = field(default_factory=dict)  # every column there was, in order

    def scan_any(self, data: Any, where: Location) -> None:
        """Data of any kind."""
        if is_instance_of(data, "datasets", "Dataset"):
            self.scan_dataset(data, where or ((f"split {str(data.split)!r}",) if data.split else ()))
        elif isinstance(data, Mapping) and self.is_split_dict(data):
            for name, part in data.items():
                self.scan_any(part, (*where, f"split {str(name)!r}"))
        elif isinstance(data, Mapping):
            self.scan_row(data, where, partial(_format_row, 0))
        elif is_instance_of(data, "datasets", "IterableDataset") and data.features is not None:
            self.warn_not_splittable("a stream")
            self.scan_stream(data, where)
        else:
            self.scan_items(data, where)

    def scan_dataset(self, data: Any, where: Location) -> None:
        """A `datasets.Dataset`: below every format but a transform lies the same table."""
        from pema_adapters.scanning import arrow, integrity

        is_transformed = data.format["type"] == "custom"
        columns = [name for name in data.data.column_names if is_transformed or name in self.columns]
        integrity.check_columns(data, columns, format_location(where))
        if is_transformed:
            self.warn_not_splittable("a data set with a transform")
            for start in range(0, len(data), BATCH_ROWS):
                self.scan_row(data[start : start + BATCH_ROWS], where, partial(_format_row, start))
                self.progress.advance(min(BATCH_ROWS, len(data) - start))
            return
        indices = None if data._indices is None else data._indices.column(0)
        picked = arrow.build_row_mask(indices, data.data.num_rows)
        self.scan_table(data.data, where, partial(arrow.find_dataset_row, indices), picked)

    def scan_stream(self, data: Any, where: Location) -> None:
        """A `datasets.IterableDataset` with features, as Arrow tables."""
        from pema_adapters.scanning import integrity
        from pema_adapters.scanning.data_files import iterate_stream

        tables = iterate_stream(data.with_format("arrow").iter(BATCH_ROWS), format_location(where))
        for first, table in zip(count(0, BATCH_ROWS), tables):
            for name in self.select_columns(table.column_names):
                for chunk in table.column(table.column_names.index(name)).chunks:
                    integrity.check_array(chunk, f"{format_location(where)}, column {name!r}")
            self.scan_table(table, where, partial(add, first))

    def scan_table(self, table: Any, where: Location, number_of: Callable[[int], int], picked: Any = None) -> None:
        """An Arrow table; `number_of` turns its rows' positions into the numbers that the caller knows."""
        from pema_adapters.scanning import arrow

        for order, name in enumerate(self.select_columns(table.column_names)):
            column = table.column(table.column_names.index(name))
            if not arrow.is_integer_type(column.type):
                self.refuse_type((*where, f"column {name!r}"), f"type {column.type}")
            pieces = (piece for piece in arrow.iterate_slices(column, picked) if not self.progress.skip_step())
            for part, found in self.mark_slices(pieces, name):
                if found is not None:
                    piece, wrong = found
                    row = arrow.find_first_invalid_row(
                        piece.array,
                        lambda part: self.mark_array(part, name) is not None,  # noqa: B023
                    )
                    self.refuse_id((*where, f"column {name!r}", f"row {number_of(piece.table_row(row))}"), wrong)
                self.progress.advance(0 if order else sum(len(piece.array) for piece in part), len(part))

    def mark_slices(self, pieces: Iterable[Any], column: str) -> Iterator[tuple[list[Any], InvalidId]]:
        """Mark pieces of an Arrow column, and give them back in order, some at a time, with what does not fit."""
        from pema_adapters.scanning import arrow

        if self.num_proc == 1:
            for piece in pieces:
                yield [piece], _mark_pieces(self.bitmap, [piece], column)
            return
        with ThreadPoolExecutor(self.num_proc) as pool:  # NumPy works without Python's lock
            waiting: deque[_PendingSlices] = deque()
            for part in arrow.group_slices(pieces):
                if len(waiting) == 2 * self.num_proc:
                    yield self.merge_pending(waiting.popleft())
                tokens = sum(arrow.count_integers(piece.array) for piece in part)
                bitmap = self.bitmap.fork(sum(begun.tokens for begun in waiting))
                waiting.append(_PendingSlices(part, bitmap, tokens, pool.submit(_mark_pieces, bitmap, part, column)))
            while waiting:
                yield self.merge_pending(waiting.popleft())

    def merge_pending(self, begun: "_PendingSlices") -> tuple[list[Any], InvalidId]:
        """Take over what a thread has marked."""
        wrong = begun.wrong.result()
        self.bitmap.merge(begun.bitmap)
        return begun.part, wrong

    def mark_array(self, array: Any, column: str) -> int | None:
        """Mark the integers of an Arrow array; return the first id that does not fit, if any."""
        return _mark_array(self.bitmap, array, column)

    def scan_items(self, data: Any, where: Location) -> None:
        """Any iterable of rows, batches, or further data sets."""
        found = iterate(data, format_location(where))
        if is_instance_of(data, "datasets", "IterableDataset"):
            from pema_adapters.scanning.data_files import iterate_stream

            found = iterate_stream(found, format_location(where))
        for number, item in enumerate(found):
            if self.progress.skip_step():
                continue
            if isinstance(item, Mapping) and not self.is_split_dict(item):
                self.warn_not_splittable(type(data).__name__)
                self.scan_row(item, where, partial(_format_item, number))
            else:
                self.scan_any(item, (*where[:-1], f"{where[-1] if where else 'data'}[{number}]"))
            self.progress.advance(1)

    def scan_row(self, row: Mapping[str, Any], where: Location, place: Callable[[int | None], str]) -> None:
        """One row or batch; `place` names it, or given a position, the row in the batch."""
        for name in self.select_columns(row.keys()):
            try:
                for position, ids in iterate_integers(row[name]):
                    if (wrong := self.bitmap.mark(ids.reshape(-1), is_label_column(name))) is not None:
                        row_of_array = int(np.nonzero(ids == wrong)[0][0]) if ids.ndim > 1 else None
                        at = place(row_of_array if position is None else position)
                        self.refuse_id((*where, f"column {name!r}", at), wrong)
            except NotIdsError as error:
                self.refuse_type((*where, f"column {name!r}", place(None)), str(error))

    def is_split_dict(self, data: Mapping[Any, Any]) -> bool:
        """Whether a mapping is a dict of splits rather than a row or a batch."""
        if any(column in data for column in self.columns):
            return False
        return bool(data) and all(self.is_split(part) for part in data.values())

    def is_split(self, part: Any) -> bool:
        """Whether a part of a mapping is a split, or itself a dict of splits."""
        if isinstance(part, Mapping):
            return any(column in part for column in self.columns) or self.is_split_dict(part)
        if isinstance(part, (list, tuple)):
            return bool(part) and self.is_split(part[0])
        return not isinstance(part, (str, bytes)) and not hasattr(part, "__array__") and is_iterable(part)

    def warn_not_splittable(self, what: str) -> None:
        """Data that nobody can be sent to the middle of."""
        if self.num_proc > 1:
            self.notes[f"{what} is read by one process, not {self.num_proc}: it has no parts to share"] = None

    def select_columns(self, names: Collection[str]) -> list[str]:
        """The columns to read, of those that are there."""
        if not self.present.keys() >= set(names):
            self.present.update(dict.fromkeys(names))
            self.found.update(column for column in self.columns if column in self.present)
        return [column for column in self.columns if column in names]

    def build_result(self, optional: Collection[str]) -> Scan:
        """What was found; refused where a column that must exist was nowhere."""
        defaults = DEFAULT_COLUMNS if set(DEFAULT_COLUMNS) <= set(self.columns) else ()
        missing = [name for name in self.columns if name not in {*self.found, *optional, *defaults}]
        if missing or not self.found:
            self.refuse_columns(missing or self.columns)
        used = tuple(name for name in self.columns if name in self.found)
        return Scan(np.flatnonzero(self.bitmap.seen), self.bitmap.tokens, used, notes=tuple(self.notes))

    def refuse_columns(self, missing: Collection[str]) -> NoReturn:
        """No such columns."""
        there = ", ".join(map(repr, self.present)) or "no rows at all (a generator that was used up already?)"
        raise VocabularyError(
            f"no column {', '.join(map(repr, missing))} anywhere in the data; found: {there}; tokenize first, "
            "data = data.map(lambda row: tokenizer(row['text'])), or name the columns that hold token ids, "
            "columns=('input_ids', ...)"
        )

    def refuse_id(self, where: Location, wrong: int) -> NoReturn:
        """An id outside of [0, V)."""
        size = len(self.bitmap.seen)
        raise VocabularyError(
            f"{', '.join(where)}: token id {wrong} is outside the embedding, whose V = {size:,} rows are 0 "
            f"to {size - 1:,}; {_NEGATIVE if wrong < 0 else _TOO_LARGE}"
        )

    def refuse_type(self, where: Location, found: str) -> NoReturn:
        """Values that are no ids."""
        raise VocabularyError(
            f"{', '.join(where)}: found {found}, expected token ids, which are integers or lists of "
            "them; tokenize text first, cast numbers with dataset.cast_column, or name other columns, columns=(...)"
        )


_NEGATIVE = (
    "negative ids are skipped only in columns that end in 'labels': take this column out of columns=(...), "
    "or put the pad token's id in place of the negative ones"
)
_TOO_LARGE = (
    "was the text tokenized with another model's tokenizer, or were tokens added without "
    "model.resize_token_embeddings(len(tokenizer))?"
)


@dataclass(frozen=True)
class _PendingSlices:
    """Pieces that a thread marks: in a bitmap of their own, so many tokens, and what does not fit."""

    part: list[Any]
    bitmap: Bitmap
    tokens: int
    wrong: "Future[InvalidId]"


def _mark_pieces(bitmap: Bitmap, pieces: list[Any], column: str) -> InvalidId:
    """Mark pieces of an Arrow column; return the first that does not fit, and its first id that does not."""
    for piece in pieces:
        if (wrong := _mark_array(bitmap, piece.array, column)) is not None:
            return piece, wrong
    return None


def _mark_array(bitmap: Bitmap, array: Any, column: str) -> int | None:
    from pema_adapters.scanning import arrow

    for ids in arrow.iterate_integers(array):
        if (wrong := bitmap.mark(ids, is_label_column(column))) is not None:
            return wrong
    return None


def format_location(where: Location) -> str:
    """Join the parts of a location for an error message."""
    return ", ".join(where) or "data"


def is_label_column(column: str) -> bool:
    """Tell whether negative ids of a column are skipped."""
    return column.endswith("labels")


def _format_item(number: int, row: int | None) -> str:
    return f"row {number}" if row is None else f"item {number}, row {row} of it"


def _format_row(start: int, row: int | None) -> str:
    return f"row {start + (row or 0)}"
