"""Collect the token ids of tokenized data of any kind: one bit per embedding row, one pass, constant memory.

    scan(tokenized, vocab_size=250_002).token_ids

The Arrow buffers of a `datasets.Dataset` are read without a copy; other data are read row by row. `text_scanner` does
the same for text.
"""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from pema_adapters.scanning.bitmap import Bitmap
from pema_adapters.scanning.iteration import (
    estimate_length,
    is_instance_of,
    is_iterable,
    iterate,
    preserve_random_state,
)
from pema_adapters.scanning.progress import ScanProgress, open_scan_bar
from pema_adapters.scanning.scan_errors import Location, format_location, refuse_columns, refuse_id, refuse_type
from pema_adapters.scanning.validation import DEFAULT_COLUMNS, validate_num_proc, validate_vocab_size
from pema_adapters.scanning.values import NotIdsError, iterate_integers

BATCH_ROWS = 1_000  # rows per batch from a transform or a stream

FormatRow = Callable[[int | None], str]  # names a row; given a position, that row of a batch


@dataclass(frozen=True)
class Scan:
    """The result of a scan.

    Attributes:
        token_ids: the K distinct ids, intp [K], increasing.
        tokens: the number of tokens read.
        columns: the columns that were read.
        growth: for text, the vocabulary growth of the paper's figure 2: pairs (tokens read, distinct ids among them),
            ten per decade of tokens. The last one is (tokens, K).
        notes: remarks for the user on how the scan was done.
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

    Rows that the indices mapping of a data set picks repeatedly are read and counted once.
    """
    columns = (columns,) if isinstance(columns, str) else tuple(columns)
    bitmap = Bitmap(validate_vocab_size(vocab_size))
    with open_scan_bar(estimate_length(data), progress) as bar, preserve_random_state(data):
        scanner = Scanner(bitmap, columns, ScanProgress(bitmap, bar), validate_num_proc(num_proc))
        scanner.scan_any(data, ())
        scanner.progress.finish()
    for note in scanner.notes:
        warnings.warn(note, stacklevel=3)  # points at the caller of PartialVocabulary.from_dataset
    return scanner.build_result(optional)


@dataclass
class Scanner:
    """Finds the columns of ids in nested data of any kind, and marks the ids in a bitmap."""

    bitmap: Bitmap
    columns: tuple[str, ...]
    progress: ScanProgress
    num_proc: int = 1
    notes: dict[str, None] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)  # those of `columns` that exist
    present: dict[str, None] = field(default_factory=dict)  # all columns of the data, in order

    def scan_any(self, data: Any, location: Location) -> None:
        """Scan data of any kind."""
        if is_instance_of(data, "datasets", "Dataset"):
            self.scan_dataset(data, location or ((f"split {str(data.split)!r}",) if data.split else ()))
        elif isinstance(data, Mapping) and self.is_split_dict(data):
            for name, split in data.items():
                self.scan_any(split, (*location, f"split {str(name)!r}"))
        elif isinstance(data, Mapping):
            self.scan_row(data, location, partial(_format_row, 0))
        elif is_instance_of(data, "datasets", "IterableDataset") and data.features is not None:
            self.warn_not_splittable("a stream")
            self.scan_stream(data, location)
        else:
            self.scan_items(data, location)

    def scan_dataset(self, data: Any, location: Location) -> None:
        """Scan the Arrow table of a `datasets.Dataset`; only a transform makes rows that differ from it."""
        from pema_adapters.scanning import arrow, integrity

        is_transformed = data.format["type"] == "custom"
        columns = [name for name in data.data.column_names if is_transformed or name in self.columns]
        integrity.check_columns(data, columns, format_location(location))
        if is_transformed:
            self._scan_transformed(data, location)
            return
        indices = None if data._indices is None else data._indices.column(0)
        mask = arrow.build_row_mask(indices, data.data.num_rows)
        self.scan_table(data.data, location, partial(arrow.find_dataset_row, indices), mask)

    def _scan_transformed(self, data: Any, location: Location) -> None:
        self.warn_not_splittable("a data set with a transform")
        for start in range(0, len(data), BATCH_ROWS):
            self.scan_row(data[start : start + BATCH_ROWS], location, partial(_format_row, start))
            self.progress.advance(min(BATCH_ROWS, len(data) - start))

    def scan_stream(self, data: Any, location: Location) -> None:
        """Scan a `datasets.IterableDataset` with features as Arrow tables."""
        from pema_adapters.scanning import integrity
        from pema_adapters.scanning.data_files import iterate_stream

        tables = iterate_stream(data.with_format("arrow").iter(BATCH_ROWS), format_location(location))
        for first, table in zip(count(0, BATCH_ROWS), tables):
            for name in self.select_columns(table.column_names):
                for chunk in table.column(table.column_names.index(name)).chunks:
                    integrity.check_array(chunk, f"{format_location(location)}, column {name!r}")
            self.scan_table(table, location, partial(add, first))

    def scan_table(self, table: Any, location: Location, to_user_row: Callable[[int], int], mask: Any = None) -> None:
        """Scan the columns of an Arrow table.

        Args:
            table: a `pyarrow.Table` or a table of `datasets`.
            location: where the table is in the caller's data.
            to_user_row: maps a row of the table to the number under which the caller knows it.
            mask: bool [rows of the table], the rows to read; None: all.
        """
        from pema_adapters.scanning import arrow

        for order, name in enumerate(self.select_columns(table.column_names)):
            column = table.column(table.column_names.index(name))
            if not arrow.is_integer_type(column.type):
                refuse_type((*location, f"column {name!r}"), f"type {column.type}")
            self._scan_column(arrow.iterate_slices(column, mask), name, location, to_user_row, counts_rows=order == 0)

    def _scan_column(
        self, slices: Any, name: str, location: Location, to_user_row: Callable[[int], int], *, counts_rows: bool
    ) -> None:
        from pema_adapters.scanning.arrow_marking import mark_slices

        new = (one for one in slices if not self.progress.skip_step())
        options: dict[str, Any] = {"skip_negative": _is_labels(name), "num_proc": self.num_proc}
        for marked in mark_slices(self.bitmap, new, **options):
            if (invalid := marked.invalid) is not None:
                row = f"row {to_user_row(invalid.table_row)}"
                refuse_id((*location, f"column {name!r}", row), invalid.token_id, self.bitmap.vocab_size)
            self.progress.advance(marked.row_count if counts_rows else 0, len(marked.slices))

    def scan_items(self, data: Any, location: Location) -> None:
        """Scan an iterable of rows, batches or further data sets."""
        items = iterate(data, format_location(location))
        if is_instance_of(data, "datasets", "IterableDataset"):
            from pema_adapters.scanning.data_files import iterate_stream

            items = iterate_stream(items, format_location(location))
        for number, item in enumerate(items):
            if self.progress.skip_step():
                continue
            if isinstance(item, Mapping) and not self.is_split_dict(item):
                self.warn_not_splittable(type(data).__name__)
                self.scan_row(item, location, partial(_format_item, number))
            else:
                self.scan_any(item, (*location[:-1], f"{location[-1] if location else 'data'}[{number}]"))
            self.progress.advance(1)

    def scan_row(self, row: Mapping[str, Any], location: Location, format_row: FormatRow) -> None:
        """Scan one row or batch."""
        for name in self.select_columns(row.keys()):
            try:
                self._scan_value(row[name], name, location, format_row)
            except NotIdsError as error:
                refuse_type((*location, f"column {name!r}", format_row(None)), str(error))

    def _scan_value(self, value: Any, name: str, location: Location, format_row: FormatRow) -> None:
        for position, ids in iterate_integers(value):
            if (token_id := self.bitmap.mark(ids.reshape(-1), _is_labels(name))) is not None:
                array_row = int(np.nonzero(ids == token_id)[0][0]) if ids.ndim > 1 else None
                row = format_row(array_row if position is None else position)
                refuse_id((*location, f"column {name!r}", row), token_id, self.bitmap.vocab_size)

    def is_split_dict(self, data: Mapping[Any, Any]) -> bool:
        """Tell whether a mapping is a dict of splits rather than a row or a batch."""
        if any(column in data for column in self.columns):
            return False
        return bool(data) and all(self._holds_rows(part) for part in data.values())

    def _holds_rows(self, part: Any) -> bool:
        """Tell whether a value of a mapping is a split or a dict of splits."""
        if isinstance(part, Mapping):
            return any(column in part for column in self.columns) or self.is_split_dict(part)
        if isinstance(part, (list, tuple)):
            return bool(part) and self._holds_rows(part[0])
        return not isinstance(part, (str, bytes)) and not hasattr(part, "__array__") and is_iterable(part)

    def warn_not_splittable(self, kind: str) -> None:
        """Note that data without random access are read on one thread, if more were asked for."""
        if self.num_proc > 1:
            self.notes[f"{kind} is read by one process, not {self.num_proc}: it has no parts to share"] = None

    def select_columns(self, names: Collection[str]) -> list[str]:
        """Return the columns to read among `names`, and record which columns exist."""
        if not self.present.keys() >= set(names):
            self.present.update(dict.fromkeys(names))
            self.found.update(column for column in self.columns if column in self.present)
        return [column for column in self.columns if column in names]

    def build_result(self, optional: Collection[str]) -> Scan:
        """Return the result.

        Args:
            optional: columns that need not exist, besides the default ones.

        Raises:
            VocabularyError: a required column was nowhere in the data.
        """
        defaults = DEFAULT_COLUMNS if set(DEFAULT_COLUMNS) <= set(self.columns) else ()
        missing = [name for name in self.columns if name not in {*self.found, *optional, *defaults}]
        if missing or not self.found:
            refuse_columns(missing or self.columns, self.present)
        columns = tuple(name for name in self.columns if name in self.found)
        return Scan(np.flatnonzero(self.bitmap.seen), self.bitmap.tokens, columns, notes=tuple(self.notes))


def _is_labels(column: str) -> bool:
    return column.endswith("labels")


def _format_item(number: int, row: int | None) -> str:
    return f"row {number}" if row is None else f"item {number}, row {row} of it"


def _format_row(start: int, row: int | None) -> str:
    return f"row {start + (row or 0)}"
