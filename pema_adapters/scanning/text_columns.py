"""Choose the columns of text of a data set, and iterate over their values in batches for the tokenizer."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any

from pema_adapters.errors import VocabularyError
from pema_adapters.scanning.data_files import translate_errors
from pema_adapters.scanning.iteration import is_instance_of
from pema_adapters.scanning.tokenization import SAMPLE_ROWS, Batch, BatchTokenizer, Value, choose_tokenizer
from pema_adapters.scanning.validation import DEFAULT_COLUMNS

BATCH_ROWS = 1_000  # rows per batch for the tokenizer

TEXTS = (str, list, type(None))  # values that the tokenizer takes
FORMATTED = (int, float, Decimal, date)  # values that are tokenized as str(value)
TEXT, NOTHING = str.__name__, type(None).__name__
STRINGS = ("string", "large_string")  # dtypes of `datasets`

Rows = dict[str, list[Any]]  # a batch of rows as `datasets` returns it
Columns = tuple[str, ...]  # one column of text, or two for a pair


@dataclass
class Encoder:
    """Selects the text of a data set and the way to tokenize it.

    Args:
        tokenizer: a transformers tokenizer; it adds the special tokens that it always adds.
        text_columns: columns of strings or of lists of words. Each one is tokenized by itself; "A,B" tokenizes columns
            A and B as a pair, unless a column has that name. Default: the columns of ids if there are any, else all
            columns of strings.
        max_length: the maximum number of tokens; the longer text of a pair is truncated first. None: no truncation.
    """

    tokenizer: Any
    text_columns: tuple[str, ...] = ()
    max_length: int | None = None
    used: dict[str, None] = field(default_factory=dict, init=False)  # columns that are read, in order
    present: dict[str, str] = field(default_factory=dict, init=False)  # all columns, and the types of their values
    _batch_tokenizer: BatchTokenizer | None = field(default=None, init=False)

    def plan(self, split: Any, name: str) -> "SplitPlan":
        """Plan how to read a split.

        Reads the first rows to find the columns. They are read again by the scan: of many files, none stays open, and
        no rows stay in memory.

        Args:
            split: a `datasets.Dataset` or `IterableDataset`.
            name: the name of the split in errors.

        Raises:
            VocabularyError: there is nothing to tokenize.
            FormatError: the data are damaged.
        """
        if is_instance_of(split, "datasets", "Dataset"):
            from pema_adapters.scanning.integrity import check_columns

            check_columns(split, split.data.column_names, name)
        first = next(_iterate_rows(split, name), {})
        types = {column: _infer_type(split, column, values) for column, values in first.items()}
        self.present.update(types)
        columns = self._select_columns(types)
        if first and not columns:
            self._refuse(f"{name}: no column {self._format_missing(first) or 'that holds strings'}")
        self.used.update(dict.fromkeys(map(",".join, columns)))
        if not self.text_columns and {column for one in columns for column in one} <= set(DEFAULT_COLUMNS):
            ids = [column for (column,) in columns]
            return self._plan_ids(name, split.select_columns(ids) if ids else [])
        plan = SplitPlan(name, split, list(columns), self.used, None if self.text_columns else types)
        plan.sample = [_take_sample(plan.extract_batch(first, 0))]
        return plan

    def _plan_ids(self, name: str, split: Any) -> "SplitPlan":
        if split and self.max_length is not None:
            self._refuse(f"{name}: holds token ids already, which max_length {self.max_length} does not truncate")
        return SplitPlan(name, split)

    def check_columns(self, names: list[str]) -> None:
        """Check that each column of `text_columns` was in some split, and that there is anything to read.

        Args:
            names: the names of all splits, for the message.

        Raises:
            VocabularyError: a column was not found.
        """
        if any(wanted not in self.used for wanted in self.text_columns):
            missing = self._format_missing({column: [] for column in self.present})
            self._refuse(f"no column {missing} anywhere in the data" if missing else "no split has both of a pair")
        if not self.used:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            self._refuse(f"{shown}: no text and no token ids anywhere in the data")

    def choose_tokenizer(self, sample: Batch) -> BatchTokenizer:
        """Choose a tokenizer for a split by a sample of its text.

        Returns the same object as long as the choice is the same, so that worker processes need not restart.
        """
        found = choose_tokenizer(self.tokenizer, self.max_length, sample)
        if self._batch_tokenizer is None or self._batch_tokenizer.in_rust != found.in_rust:
            self._batch_tokenizer = found
        return self._batch_tokenizer

    @property
    def batch_rows(self) -> int:
        """Rows per batch; the last batch of a split may be smaller."""
        return BATCH_ROWS

    def _format_missing(self, rows: Rows) -> str:
        """List the columns of `text_columns` that are missing."""
        wanted = [
            column for name in self.text_columns if not _resolve_columns(name, rows) for column in _parse_columns(name)
        ]
        return ", ".join(repr(column) for column in dict.fromkeys(wanted) if column not in rows)

    def _refuse(self, what: str) -> None:
        there = ", ".join(f"{column} ({kind})" for column, kind in self.present.items()) or "no rows"
        raise VocabularyError(f"{what}; found: {there}; name the columns of text, --text-column C or, a pair, A,B")

    def _select_columns(self, types: dict[str, str]) -> tuple[Columns, ...]:
        if self.text_columns:
            return tuple(columns for name in self.text_columns if (columns := _resolve_columns(name, types)))
        ids = tuple((column,) for column in DEFAULT_COLUMNS if column in types)
        return ids or tuple((column,) for column, kind in types.items() if kind == TEXT)


@dataclass
class SplitPlan:
    """The columns to read of a split.

    Attributes:
        name: the name of the split in errors.
        split: a `datasets.Dataset` or `IterableDataset`.
        columns: columns of text; empty if the split holds ids already.
        used: `Encoder.used`.
        types: the first type of each column, if all columns of strings are read; None if the columns are named.
        sample: some of the first values of all columns, as one column.
    """

    name: str
    split: Any
    columns: list[Columns] = field(default_factory=list)
    used: dict[str, None] = field(default_factory=dict)
    types: dict[str, str] | None = None
    sample: Batch = field(default_factory=list)

    def iterate_batches(self, skipped: int) -> Iterator[Batch]:
        """Iterate over batches for the tokenizer, each a list of values per column, after the first `skipped` ones."""
        split, first = self.split, 0
        if is_instance_of(split, "datasets", "Dataset"):  # has random access
            if not (left := range(skipped * BATCH_ROWS, len(split))):
                return
            split, first = split.select(left), skipped
        for number, rows in enumerate(_iterate_rows(split, self.name), first):
            self._add_late_columns(rows, number * BATCH_ROWS)
            if number >= skipped:
                yield self.extract_batch(rows, number * BATCH_ROWS)

    def extract_batch(self, rows: Rows, first: int) -> Batch:
        """Return the values of rows, a list per column; `first` is the number of the first row."""
        return [self._extract_column(rows, columns, first) for columns in self.columns]

    def _add_late_columns(self, rows: Rows, first: int) -> None:
        """Add columns of strings whose first value comes after the first rows of a stream."""
        if self.types is None:
            return
        for column, values in rows.items():
            known, value = self.types.get(column, NOTHING), _find_first(values)
            if value is None or known == TEXT:
                continue
            if known == NOTHING and isinstance(value, str):
                self.columns.append((column,))
                self.used[column] = None
            elif isinstance(value, str):
                raise VocabularyError(
                    f"{self.name}, column {column!r}: found str from row {first} on, but {known} before; to read both "
                    f"as text, name all columns of text, --text-column {column} among them"
                )
            self.types[column] = type(value).__name__

    def _extract_column(self, rows: Rows, columns: Columns, first: int) -> list[Value]:
        """Return texts or pairs of texts; if one text of a pair is missing, the other alone."""
        texts = [self._extract_texts(rows, column, first) for column in columns]
        return texts[0] if len(texts) == 1 else [_join_pair(*pair) for pair in zip(*texts, strict=True)]

    def _extract_texts(self, rows: Rows, column: str, first: int) -> list[Value]:
        if column not in rows:  # rows of JSON may lack a key
            return [None] * max(map(len, rows.values()), default=0)
        values = rows[column]
        if set(map(type, values)) <= set(TEXTS):
            return values
        for row, value in enumerate(values, first):
            if not isinstance(value, (*TEXTS, *FORMATTED)):
                raise VocabularyError(
                    f"{self.name}, column {column!r}, row {row}: found {type(value).__name__}, expected text, a list "
                    "of words, or a number; name the columns of text, --text-column C"
                )
        return [value if isinstance(value, TEXTS) else str(value) for value in values]


def _parse_columns(name: str) -> Columns:
    """Split "A,B" into two columns."""
    parts = tuple(name.split(","))
    return parts if len(parts) == 2 else (name,)


def _resolve_columns(name: str, rows: Collection[str]) -> Columns:
    """Return the columns that an option names, or () if one is missing; a column called "A,B" wins over the pair."""
    return next(
        (columns for columns in ((name,), _parse_columns(name)) if all(column in rows for column in columns)), ()
    )


def _take_sample(batch: Batch) -> list[Value]:
    there = ([value for value in values if value is not None] for values in batch)
    return [value for values in there for value in values[:SAMPLE_ROWS]]


def _join_pair(first: Value, second: Value) -> Value:
    return second if first is None else first if second is None else (first, second)


def _infer_type(split: Any, column: str, values: list[Any]) -> str:
    """Return the type of the first value; for a column without values so far, that of the split's features."""
    kind = type(_find_first(values)).__name__
    features = getattr(split, "features", None) or {}
    return TEXT if kind == NOTHING and getattr(features.get(column), "dtype", "") in STRINGS else kind


def _find_first(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _iterate_rows(split: Any, name: str) -> Iterator[Rows]:
    with translate_errors(name):
        yield from split.with_format(None).iter(BATCH_ROWS)
