"""Tokenize batches of text, by the Rust backend wherever it returns the same ids as the tokenizer's call.

The Rust batch call without offsets takes about half the time of `tokenizer(texts)`, uses all cores, and releases the
GIL, so that the next batch is read meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from pema_adapters.errors import VocabularyError

SAMPLE_ROWS = 100  # rows of the sample on which the Rust backend must agree with the tokenizer
TRUSTED_PREFIX = "transformers."  # the __call__ of other classes may do anything

Value = Any  # a text, a list of words, a pair (tuple) of either, or None
Settings = dict[str, Any] | None
Batch = list[list[Value]]  # columns of values, all of the same length


@dataclass(frozen=True)
class EncodedBatch:
    """The token ids of a batch.

    Attributes:
        ids: intp [tokens], row by row, and column by column within a row.
        lengths: intp [rows * columns], the tokens of each value.
        columns: the number of columns.
    """

    ids: npt.NDArray[np.intp]
    lengths: npt.NDArray[np.intp]
    columns: int

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.lengths) // self.columns

    def locate(self, position: int) -> tuple[int, int]:
        """Return the row and column of the id at a position."""
        value = int(np.searchsorted(np.cumsum(self.lengths), position, side="right"))
        return value // self.columns, value % self.columns


@dataclass(frozen=True)
class BatchTokenizer:
    """Tokenizes batches. Picklable, holds no data.

    Attributes:
        encode: maps texts (or pairs) of one kind, and whether they are lists of words, to the ids of each.
        in_rust: whether several threads may call it.
    """

    encode: Callable[[Sequence[Value], bool], Sequence[Sequence[int]]]
    in_rust: bool

    def __call__(self, batch: Batch) -> EncodedBatch:
        """Tokenize a batch; missing text has no ids."""
        columns = [self._encode_column(values) for values in batch]
        if not columns:
            return EncodedBatch(np.empty(0, np.intp), np.empty(0, np.intp), 1)
        rows = columns[0] if len(columns) == 1 else [ids for row in zip(*columns, strict=True) for ids in row]
        lengths = np.fromiter(map(len, rows), np.intp, len(rows))
        return EncodedBatch(np.fromiter(chain.from_iterable(rows), np.intp, int(lengths.sum())), lengths, len(columns))

    def _encode_column(self, values: Sequence[Value]) -> Sequence[Sequence[int]]:
        if set(map(type, values)) == {str}:  # fast path for most columns
            return self.encode(values, False)
        kinds = [_classify_value(value) for value in values]
        if len(different := set(kinds)) == 1 and (only := different.pop()) is not None:
            return self.encode(values, only[1])
        found: list[Sequence[int]] = [()] * len(values)
        for kind in dict.fromkeys(kinds):
            if kind is not None:
                positions = [at for at, one in enumerate(kinds) if one == kind]
                encoded = self.encode([values[at] for at in positions], kind[1])
                for at, ids in zip(positions, encoded, strict=True):
                    found[at] = ids
        return found


def choose_tokenizer(tokenizer: Any, max_length: int | None, sample: Batch) -> BatchTokenizer:
    """Choose the fastest way to tokenize that equals `tokenizer(...)["input_ids"]` on a sample of the text.

    Call this function and its result within `preserve_settings(tokenizer)`: they change the settings of the
    tokenizer's Rust backend, as each call of the tokenizer does.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: the maximum number of tokens, as with `truncation=True`; None: no truncation.
        sample: a batch of text.

    Raises:
        VocabularyError: the tokenizer refuses the sample.
    """
    plain = BatchTokenizer(_PythonEncoder(tokenizer, max_length), in_rust=False)
    expected = plain(sample)
    backend = _configure_backend(tokenizer, max_length)
    if backend is None:
        return plain
    fast = BatchTokenizer(_RustEncoder(backend), in_rust=True)
    return fast if _are_equal(fast(sample), expected) else plain


def _are_equal(left: EncodedBatch, right: EncodedBatch) -> bool:
    return np.array_equal(left.ids, right.ids) and np.array_equal(left.lengths, right.lengths)


def _classify_value(value: Value) -> tuple[bool, bool] | None:
    """Return (is a pair, is made of words), or None for missing text."""
    if value is None:
        return None
    if isinstance(value, str):
        return False, False
    is_pair = isinstance(value, tuple)
    return is_pair, isinstance(value[0] if is_pair else value, list)


@dataclass(frozen=True)
class _PythonEncoder:
    """Encodes by the tokenizer's own call, and turns its exceptions into a VocabularyError."""

    tokenizer: Any
    max_length: int | None

    def __call__(self, texts: Sequence[Value], are_words: bool) -> Sequence[Sequence[int]]:
        options = {"truncation": self.max_length is not None, "max_length": self.max_length, "verbose": False}
        options |= {"return_attention_mask": False, "return_token_type_ids": False}  # saves a fifth of the time
        columns = [list(column) for column in zip(*texts, strict=True)] if isinstance(texts[0], tuple) else [texts]
        try:
            encoded: dict[str, Any] = self.tokenizer(*columns, is_split_into_words=are_words, **options)
        except (AssertionError, ValueError, TypeError, LookupError, NotImplementedError) as error:
            raise VocabularyError(f"{type(self.tokenizer).__name__} refuses the text: {error}") from error
        ids: Sequence[Sequence[int]] = encoded["input_ids"]
        return ids


@dataclass(frozen=True)
class _RustEncoder:
    """Encodes by the batch call of `tokenizers`, without offsets."""

    backend: Any

    def __reduce__(self) -> tuple[Any, ...]:
        return _build_rust_encoder, (
            self.backend,
            self.backend.encode_special_tokens,
        )  # tokenizers does not pickle the latter

    def __call__(self, texts: Sequence[Value], are_words: bool) -> Sequence[Sequence[int]]:
        try:
            return [one.ids for one in self.backend.encode_batch_fast(texts, is_pretokenized=are_words)]
        except Exception as error:  # tokenizers raises no narrower class
            raise VocabularyError(f"the tokenizer refuses the text: {error}") from error


def _build_rust_encoder(backend: Any, encode_special_tokens: bool) -> _RustEncoder:
    backend.encode_special_tokens = encode_special_tokens
    return _RustEncoder(backend)


def _configure_backend(tokenizer: Any, max_length: int | None) -> Any:
    """Return the Rust backend of a fast tokenizer of transformers, set as its call sets it; None for others.

    Not a copy: copying takes longer than tokenizing much text.
    """
    if not getattr(tokenizer, "is_fast", False) or not type(tokenizer).__module__.startswith(TRUSTED_PREFIX):
        return None
    backend = tokenizer.backend_tokenizer
    truncation = {"max_length": max_length, "strategy": "longest_first", "direction": tokenizer.truncation_side}
    _apply_settings(backend, None, None if max_length is None else truncation, tokenizer.split_special_tokens)
    return backend


@contextmanager
def preserve_settings(tokenizer: Any) -> Iterator[None]:
    """Restore the padding and truncation of the tokenizer's Rust backend afterwards."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    before = backend.padding, backend.truncation, backend.encode_special_tokens
    try:
        yield
    finally:
        _apply_settings(backend, *before)


def _apply_settings(backend: Any, padding: Settings, truncation: Settings, encode_special_tokens: bool) -> None:
    backend.no_padding() if padding is None else backend.enable_padding(**padding)
    backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
    backend.encode_special_tokens = encode_special_tokens
