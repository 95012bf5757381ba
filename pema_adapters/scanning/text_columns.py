"""Columns of text, a batch of rows at a time: which there are, and their values for the tokenizer."""

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

BATCH_ROWS = 1_000  # rows tokenized at a time

TEXTS = (str, list, type(None))  # what stays as it is in a column of text
WRITTEN = (int, float, Decimal, date)  # what is tokenized as Python writes it
TEXT, NOTHING = str.__name__, type(None).__name__
STRINGS = ("string", "large_string")  # as `datasets` calls them

Rows = dict[str, list[Any]]  # a batch of rows as datasets gives it
Columns = tuple[str, ...]  # one column of text, or the two of a pair


@dataclass
class Encoder:
    """How to tokenize the text of a data set.

    Args:
        tokenizer: a transformers tokenizer; it adds the special tokens that it always adds.
        text_columns: columns of strings (or of lists of words), each tokenized by itself; "A,B": columns A and B of a
            row as a pair, unless there is a column of that name; none: ids where there are some already, else every
            column of strings.
        max_length: truncate to so many tokens, of a pair the longer text first; None: no truncation.
    """

    tokenizer: Any
    text_columns: tuple[str, ...] = ()
    max_length: int | None = None
    used: dict[str, None] = field(default_factory=dict, init=False)  # columns that are read, in order
    present: dict[str, str] = field(default_factory=dict, init=False)  # columns there are, and what they hold
    _batch_tokenizer: BatchTokenizer | None = field(default=None, init=False)

    def plan(self, split: Any, name: str) -> "SplitPlan":
        """How to read a `datasets.Dataset` or `IterableDataset`; `name` is what errors call it.

        Reads the first rows to see which columns there are. They are read again in their turn: of many files, none is
        kept open, nor its first rows in memory.

        Raises:
            VocabularyError: there is nothing to tokenize; the message lists the columns.
            FormatError: the data are damaged.
        """
        if is_instance_of(split, "datasets", "Dataset"):
            from pema_adapters.scanning.integrity import check_columns

            check_columns(split, split.data.column_names, name)
        first = next(_iterate_rows(split, name), {})
        kinds = {column: _infer_type(split, column, values) for column, values in first.items()}
        self.present.update(kinds)
        columns = self._select_columns(kinds)
        if first and not columns:
            self._refuse(f"{name}: no column {self._format_missing(first) or 'that holds strings'}")
        self.used.update(dict.fromkeys(map(",".join, columns)))
        if not self.text_columns and {column for one in columns for column in one} <= set(DEFAULT_COLUMNS):
            ids = [column for (column,) in columns]
            return self._plan_ids(name, split.select_columns(ids) if ids else [])
        plan = SplitPlan(name, split, list(columns), self.used, None if self.text_columns else kinds)
        plan.sample = [_take_sample(plan.extract_batch(first, 0))]
        return plan

    def _plan_ids(self, name: str, split: Any) -> "SplitPlan":
        if split and self.max_length is not None:
            self._refuse(f"{name}: holds token ids already, which max_length {self.max_length} does not truncate")
        return SplitPlan(name, split)

    def check_columns(self, names: list[str]) -> None:
        """Refuse a named column that was in none of the splits, which have these names."""
        if any(wanted not in self.used for wanted in self.text_columns):
            missing = self._format_missing({column: [] for column in self.present})
            self._refuse(f"no column {missing} anywhere in the data" if missing else "no split has both of a pair")
        if not self.used:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            self._refuse(f"{shown}: no text and no token ids anywhere in the data")

    def choose_tokenizer(self, sample: Batch) -> BatchTokenizer:
        """The way to tokenize, tried on a sample; the same object while the way is the same."""
        found = choose_tokenizer(self.tokenizer, self.max_length, sample)
        if self._batch_tokenizer is None or self._batch_tokenizer.in_rust != found.in_rust:
            self._batch_tokenizer = found
        return self._batch_tokenizer

    @property
    def batch_rows(self) -> int:
        """Rows of a batch, all but the last of a split."""
        return BATCH_ROWS

    def _format_missing(self, rows: Rows) -> str:
        """The named columns that are not there."""
        wanted = [
            column for name in self.text_columns if not _resolve_columns(name, rows) for column in _parse_columns(name)
        ]
        return ", ".join(repr(column) for column in dict.fromkeys(wanted) if column not in rows)

    def _refuse(self, what: str) -> None:
        there = ", ".join(f"{column} ({kind})" for column, kind in self.present.items()) or "no rows"
        raise VocabularyError(f"{what}; found: {there}; name the columns of text, --text-column C or, a pair, A,B")

    def _select_columns(self, kinds: dict[str, str]) -> tuple[Columns, ...]:
        if self.text_columns:
            return tuple(columns for name in self.text_columns if (columns := _resolve_columns(name, kinds)))
        ids = tuple((column,) for column in DEFAULT_COLUMNS if column in kinds)
        return ids or tuple((column,) for column, kind in kinds.items() if kind == TEXT)


@dataclass
class SplitPlan:
    """What to read of a split: columns of text, a batch at a time, or its ids."""

    name: str
    split: Any
    columns: list[Columns] = field(default_factory=list)  # of text; none: the split holds ids already
    used: dict[str, None] = field(default_factory=dict)  # the encoder's
    kinds: dict[str, str] | None = None  # what each column held first, where all columns of strings are to be read
    sample: Batch = field(default_factory=list)  # a few of the first values of all columns, as one column

    def iterate_batches(self, skipped: int) -> Iterator[Batch]:
        """Values for the tokenizer, a list for each of `columns`; without the first batches, which were read before."""
        split, first = self.split, 0
        if is_instance_of(split, "datasets", "Dataset"):  # which need not read what it skips
            if not (left := range(skipped * BATCH_ROWS, len(split))):
                return
            split, first = split.select(left), skipped
        for number, rows in enumerate(_iterate_rows(split, self.name), first):
            self._add_late_columns(rows, number * BATCH_ROWS)
            if number >= skipped:
                yield self.extract_batch(rows, number * BATCH_ROWS)

    def extract_batch(self, rows: Rows, first: int) -> Batch:
        """The same of rows that are read; `first` is the number of the first of them."""
        return [self._extract_column(rows, columns, first) for columns in self.columns]

    def _add_late_columns(self, rows: Rows, first: int) -> None:
        """Read a column of strings, too, where it begins behind the first rows of a stream."""
        if self.kinds is None:
            return
        for column, values in rows.items():
            known, value = self.kinds.get(column, NOTHING), _find_first(values)
            if value is None or known == TEXT:
                continue
            if known == NOTHING and isinstance(value, str):
                self.columns.append((column,))
                self.used[column] = None
            elif isinstance(value, str):
                raise VocabularyError(
                    f"{self.name}, column {column!r}: found str from row {first} on, and {known} before: name the "
                    f"columns of text, --text-column {column} for one, to have both read as text"
                )
            self.kinds[column] = type(value).__name__

    def _extract_column(self, rows: Rows, columns: Columns, first: int) -> list[Value]:
        """Texts, or pairs of texts: of a pair with one missing, the other alone."""
        texts = [self._extract_texts(rows, column, first) for column in columns]
        return texts[0] if len(texts) == 1 else [_join_pair(*pair) for pair in zip(*texts, strict=True)]

    def _extract_texts(self, rows: Rows, column: str, first: int) -> list[Value]:
        if column not in rows:  # of JSON, a part of a file may lack a key
            return [None] * max(map(len, rows.values()), default=0)
        values = rows[column]
        if set(map(type, values)) <= set(TEXTS):
            return values
        for row, value in enumerate(values, first):
            if not isinstance(value, (*TEXTS, *WRITTEN)):
                raise VocabularyError(
                    f"{self.name}, column {column!r}, row {row}: found {type(value).__name__}, expected text, a list "
                    "of words, or a number: name a column of text, --text-column C"
                )
        return [value if isinstance(value, TEXTS) else str(value) for value in values]


def _parse_columns(name: str) -> Columns:
    """The columns that an option names: "A,B" are two."""
    parts = tuple(name.split(","))
    return parts if len(parts) == 2 else (name,)


def _resolve_columns(name: str, rows: Collection[str]) -> Columns:
    """The columns that an option names, where they are all there; a column that is called "A,B" wins."""
    return next(
        (columns for columns in ((name,), _parse_columns(name)) if all(column in rows for column in columns)), ()
    )


def _take_sample(batch: Batch) -> list[Value]:
    there = ([value for value in values if value is not None] for values in batch)
    return [value for values in there for value in values[:SAMPLE_ROWS]]


def _join_pair(first: Value, second: Value) -> Value:
    return second if first is None else first if second is None else (first, second)


def _infer_type(split: Any, column: str, values: list[Any]) -> str:
    """The type of the first value there is; of a column without any so far, what the split's features say."""
    kind = type(_find_first(values)).__name__
    features = getattr(split, "features", None) or {}
    return TEXT if kind == NOTHING and getattr(features.get(column), "dtype", "") in STRINGS else kind


def _find_first(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _iterate_rows(split: Any, name: str) -> Iterator[Rows]:
    with translate_errors(name):
        yield from split.with_format(None).iter(BATCH_ROWS)
