"""Columns of text, a batch of rows at a time: which there are, and their values for the tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from pema_adapters.errors import FormatError, VocabularyError
from pema_adapters.reading.basics import DEFAULT_COLUMNS
from pema_adapters.reading.kinds import is_a
from pema_adapters.reading.tokenizing import SAMPLE, Batch, Tokenizing, Value, tokenizing

BATCH = 1_000  # rows tokenized at a time

TEXTS = (str, list, type(None))  # what stays as it is in a column of text

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
    _tokenizing: Tokenizing | None = field(default=None, init=False)

    def planned(self, split: Any, name: str) -> "Plan":
        """How to read a `datasets.Dataset` or `IterableDataset`; `name` is what errors call it.

        Reads the first rows to see which columns there are.

        Raises:
            VocabularyError: there is nothing to tokenize; the message lists the columns.
        """
        batches = _batches(split, name)
        first = next(batches, {})
        self.present.update((column, type(_first(values)).__name__) for column, values in first.items())
        columns = self._columns(first)
        if first and not columns:
            self._refuse(f"{name}: no column {self._wanted(first) or 'that holds strings'}")
        self.used.update(dict.fromkeys(map(",".join, columns)))
        if not self.text_columns and {column for one in columns for column in one} <= set(DEFAULT_COLUMNS):
            ids = [column for (column,) in columns]
            return Plan(name, split.select_columns(ids) if ids else [])
        return Plan(name, split, columns, chain([first], batches) if first else iter(()), _sample(first, columns))

    def check(self) -> None:
        """Refuse a named column that was in none of the splits."""
        if any(wanted not in self.used for wanted in self.text_columns):
            missing = self._wanted({column: [] for column in self.present})
            self._refuse(f"no column {missing} anywhere in the data" if missing else "no split has both of a pair")
        if not self.used:
            self._refuse("no text and no token ids anywhere in the data")

    def tokenizing(self, sample: Batch) -> Tokenizing:
        """The way to tokenize, tried on a sample; the same object while the way is the same."""
        found = tokenizing(self.tokenizer, self.max_length, sample)
        if self._tokenizing is None or self._tokenizing.in_rust != found.in_rust:
            self._tokenizing = found
        return self._tokenizing

    @property
    def batch(self) -> int:
        """Rows of a batch, all but the last of a split."""
        return BATCH

    def _wanted(self, rows: Rows) -> str:
        """The named columns that are not there."""
        wanted = [column for name in self.text_columns if not _of(name, rows) for column in _named(name)]
        return ", ".join(repr(column) for column in dict.fromkeys(wanted) if column not in rows)

    def _refuse(self, what: str) -> None:
        there = ", ".join(f"{column} ({kind})" for column, kind in self.present.items()) or "no rows"
        raise VocabularyError(f"{what}; found: {there}; name the columns of text, --text-column C or, a pair, A,B")

    def _columns(self, rows: Rows) -> tuple[Columns, ...]:
        if self.text_columns:
            return tuple(columns for name in self.text_columns if (columns := _of(name, rows)))
        ids = tuple((column,) for column in DEFAULT_COLUMNS if column in rows)
        return ids or tuple((column,) for column, values in rows.items() if isinstance(_first(values), str))


@dataclass(frozen=True)
class Plan:
    """What to read of a split: columns of text, a batch at a time, or its ids."""

    name: str
    split: Any
    columns: tuple[Columns, ...] = ()  # of text; none: the split holds ids already
    rows: Iterator[Rows] = field(default_factory=lambda: iter(()))
    sample: Batch = field(default_factory=list)  # of `batches`, a few of the first rows

    def batches(self, skipped: int) -> Iterator[Batch]:
        """Values for the tokenizer, a list for each of `columns`; without the first batches, which were read before."""
        rows = self.rows
        if skipped and is_a(self.split, "datasets", "Dataset"):  # which need not read what it skips
            left = range(skipped * BATCH, len(self.split))
            rows, skipped = _batches(self.split.select(left), self.name) if left else iter(()), 0
        return (_batch(rows_read, self.columns) for rows_read in islice(rows, skipped, None))


def _named(name: str) -> Columns:
    """The columns that an option names: "A,B" are two."""
    parts = tuple(name.split(","))
    return parts if len(parts) == 2 else (name,)


def _of(name: str, rows: Rows) -> Columns:
    """The columns that an option names, where they are all there; a column that is called "A,B" wins."""
    return next((columns for columns in ((name,), _named(name)) if all(column in rows for column in columns)), ())


def _batch(rows: Rows, columns: tuple[Columns, ...]) -> Batch:
    return [_values(rows, one) for one in columns]


def _sample(rows: Rows, columns: tuple[Columns, ...]) -> Batch:
    return [values[:SAMPLE] for values in _batch(rows, columns)] if rows else []


def _values(rows: Rows, columns: Columns) -> list[Value]:
    """Texts, or pairs of texts: of a pair with one missing, the other alone."""
    texts = [_texts(rows[column]) for column in columns]
    return texts[0] if len(texts) == 1 else [_pair(*pair) for pair in zip(*texts, strict=True)]


def _texts(values: list[Any]) -> list[Value]:
    if set(map(type, values)) <= set(TEXTS):
        return values
    return [value if isinstance(value, TEXTS) else str(value) for value in values]


def _pair(first: Value, second: Value) -> Value:
    return second if first is None else first if second is None else (first, second)


def _first(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _batches(split: Any, name: str) -> Iterator[Rows]:
    from datasets.exceptions import DatasetsError

    try:
        yield from split.with_format(None).iter(BATCH)
    except (OSError, ValueError, DatasetsError) as error:  # a stream meets damage only when it gets there
        raise FormatError(f"{name}: cannot be read: {error}") from error
