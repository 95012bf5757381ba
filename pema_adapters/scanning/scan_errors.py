"""Error messages of a scan: where in the caller's data, what was found, what to do next."""

from collections.abc import Collection
from typing import NoReturn

from pema_adapters.errors import VocabularyError

Location = tuple[str, ...]  # the path from the caller's data to a part of it, e.g. ("data[1]", "split 'train'")

_NEGATIVE = (
    "negative ids are skipped only in columns that end in 'labels': take this column out of columns=(...), "
    "or put the pad token's id in place of the negative ones"
)
_TOO_LARGE = (
    "was the text tokenized with another model's tokenizer, or were tokens added without "
    "model.resize_token_embeddings(len(tokenizer))?"
)


def format_location(location: Location) -> str:
    """Join the parts of a location; the data as a whole are called "data"."""
    return ", ".join(location) or "data"


def refuse_id(location: Location, token_id: int, vocab_size: int) -> NoReturn:
    """Raise a VocabularyError for an id outside [0, V)."""
    raise VocabularyError(
        f"{', '.join(location)}: token id {token_id} is outside the embedding, whose V = {vocab_size:,} rows are 0 "
        f"to {vocab_size - 1:,}; {_NEGATIVE if token_id < 0 else _TOO_LARGE}"
    )


def refuse_type(location: Location, found: str) -> NoReturn:
    """Raise a VocabularyError for values that are not token ids."""
    raise VocabularyError(
        f"{', '.join(location)}: found {found}, expected token ids, which are integers or lists of "
        "them; tokenize text first, cast numbers with dataset.cast_column, or name other columns, columns=(...)"
    )


def refuse_columns(missing: Collection[str], present: Collection[str]) -> NoReturn:
    """Raise a VocabularyError for columns that are nowhere in the data."""
    there = ", ".join(map(repr, present)) or "no rows at all (a generator that was used up already?)"
    raise VocabularyError(
        f"no column {', '.join(map(repr, missing))} anywhere in the data; found: {there}; tokenize first, "
        "data = data.map(lambda row: tokenizer(row['text'])), or name the columns that hold token ids, "
        "columns=('input_ids', ...)"
    )
