"""A model's vocabulary: its token embedding, the data columns with its ids, and the ids that it inserts itself.

This module does not import adapters, so that memory_report, which needs nothing more, starts fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pema_adapters.errors import SurgeryError, VocabularyError
from pema_adapters.scanning.validation import DEFAULT_COLUMNS
from pema_adapters.vocabulary import PartialVocabulary

INSERTED_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
"""Config entries with token ids that a model or a collator inserts by itself."""


def get_input_embedding(model: Any) -> nn.Embedding:
    """Return the token embedding of `model`.

    Raises:
        SurgeryError: it has none, or one that PEMA does not support.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise SurgeryError(
            f"{type(model).__name__} has no token embedding (found {type(embedding).__name__}, expected "
            "torch.nn.Embedding), so PEMA does not apply to it"
        )
    if embedding.max_norm is not None:
        raise SurgeryError(f"{type(model).__name__} renormalises its embedding (max_norm), which PEMA does not support")
    return embedding


def complete_vocabulary(model: Any, vocab_size: int, vocabulary: Any) -> PartialVocabulary:
    """Add the ids that the model inserts itself to a vocabulary.

    Args:
        model: the model.
        vocab_size: V.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one.

    Raises:
        VocabularyError: data without a token id, or a vocabulary of another size than V.
    """
    if not isinstance(vocabulary, PartialVocabulary):
        columns, optional = _find_columns(model)
        vocabulary = PartialVocabulary.from_dataset(
            vocabulary, vocab_size=vocab_size, columns=columns, optional=optional
        )
        if not len(vocabulary):
            raise VocabularyError(
                f"no token ids in the data: every row is empty in {', '.join(columns)}: give the tokenized "
                "training data"
            )
    if vocabulary.vocab_size != vocab_size:
        raise VocabularyError(
            f"the vocabulary is of {vocabulary.vocab_size} tokens, but {type(model).__name__} has {vocab_size} "
            f"embedding rows: make it with vocab_size={vocab_size}"
        )
    used: PartialVocabulary = vocabulary | PartialVocabulary(_find_inserted_ids(model.config, vocab_size), vocab_size)
    return used


def _find_columns(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the data columns with ids of the input embedding, and those of them that are optional.

    The decoder of an EncoderDecoderModel has its own embedding, so its columns are left out.
    """
    decoder: Any = model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else None
    own = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else None
    if own is not None and own.weight is not model.get_input_embeddings().weight:
        return DEFAULT_COLUMNS[:1], ()
    labels = () if model.get_output_embeddings() is None else ("labels",)
    return (*DEFAULT_COLUMNS, *labels), labels


def _find_inserted_ids(config: Any, vocab_size: int) -> list[int]:
    values = [getattr(config, name, None) for name in INSERTED_IDS]
    flat = [each for value in values for each in (value if isinstance(value, Iterable) else [value])]
    return [each for each in flat if isinstance(each, int) and 0 <= each < vocab_size]
