"""Text to token ids, a batch of rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from pema_adapters.errors import FormatError, VocabularyError
from pema_adapters.reading.basics import DEFAULT_COLUMNS

BATCH = 1_000  # rows tokenized at a time

Batch = dict[str, list[Any]]


@dataclass
class Encoder:
    """How to tokenize the text of a data set.

    Args:
        tokenizer: a transformers tokenizer; it adds the special tokens that it always adds.
        text_columns: columns of strings (or of lists of words), each tokenized by itself; none: ids where there
            are some already, else every column of strings.
        max_length: truncate to so many tokens; None: no truncation.
    """

    tokenizer: Any
    text_columns: tuple[str, ...] = ()
    max_length: int | None = None
    used: dict[str, None] = field(default_factory=dict, init=False)  # columns that are read, in order
    present: dict[str, str] = field(default_factory=dict, init=False)  # columns there are, and what they hold

    def encoded(self, split: Any, name: str) -> Any:
        """What to scan in place of a `datasets.Dataset` or `IterableDataset`: rows of ids, or itself if it has ids.

        Reads the first rows to see which columns there are; `name` is what errors call the split.

        Raises:
            VocabularyError: there is nothing to tokenize; the message lists the columns.
        """
        batches = _batches(split, name)
        first = next(batches, {})
        self.present.update((column, type(_first(values)).__name__) for column, values in first.items())
        columns = self._columns(first)
        if first and not columns:
            self._refuse(f"{name}: no column {', '.join(map(repr, self.text_columns)) or 'that holds strings'}")
        self.used.update(dict.fromkeys(columns))
        if not self.text_columns and set(columns) <= set(DEFAULT_COLUMNS):
            return split.select_columns(list(columns)) if columns else []
        return (row for batch in chain([first], batches) for row in self._rows(batch, columns))

    def check(self) -> None:
        """Refuse a named column that was in none of the splits."""
        missing = [column for column in self.text_columns if column not in self.used]
        if missing:
            self._refuse(f"no column {', '.join(map(repr, missing))} anywhere in the data")

    def _refuse(self, what: str) -> None:
        there = ", ".join(f"{column} ({kind})" for column, kind in self.present.items()) or "no rows"
        raise VocabularyError(f"{what}; found: {there}; name the columns of text, --text-column C")

    def _columns(self, batch: Batch) -> tuple[str, ...]:
        if self.text_columns:
            return tuple(column for column in self.text_columns if column in batch)
        ids = tuple(column for column in DEFAULT_COLUMNS if column in batch)
        return ids or tuple(column for column, values in batch.items() if isinstance(_first(values), str))

    def _rows(self, batch: Batch, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        encoded = [self._encode(batch[column]) for column in columns]
        return (dict(zip(columns, ids, strict=True)) for ids in zip(*encoded, strict=True))

    def _encode(self, values: list[Any]) -> list[list[int] | None]:
        """The ids of each value; None where there is no text."""
        texts = [value if isinstance(value, list) else str(value) for value in values if value is not None]
        if not texts:
            return [None] * len(values)
        options = {"truncation": self.max_length is not None, "max_length": self.max_length, "verbose": False}
        options |= {"return_attention_mask": False, "return_token_type_ids": False}  # a fifth of the time
        ids = iter(self.tokenizer(texts, is_split_into_words=isinstance(texts[0], list), **options)["input_ids"])
        return [None if value is None else next(ids) for value in values]


def _first(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _batches(split: Any, name: str) -> Iterator[Batch]:
    from datasets.exceptions import DatasetsError

    try:
        yield from split.with_format(None).iter(BATCH)
    except (OSError, ValueError, DatasetsError) as error:  # a stream meets damage only when it gets there
        raise FormatError(f"{name}: cannot be read: {error}") from error
