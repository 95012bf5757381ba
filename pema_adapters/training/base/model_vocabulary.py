"""What any model says of its vocabulary: its token embedding, and the ids that it inserts itself.

Apart from the modules that adapters is imported for, so that who needs no more than this does not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pema_adapters.errors import SurgeryError, VocabularyError
from pema_adapters.scanning.validation import DEFAULT_COLUMNS
from pema_adapters.vocabulary import PartialVocabulary

INSERTED_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
"""Config entries with ids that a model or a collator inserts by itself."""


def input_embedding(model: Any) -> nn.Embedding:
    """The token embedding of `model`. Raises: SurgeryError where it has none that PEMA can change."""
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
    """A vocabulary, or data to scan for one, with the ids that the model inserts itself. Raises VocabularyError."""
    if not isinstance(vocabulary, PartialVocabulary):
        columns, optional = _columns(model)
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
    used: PartialVocabulary = vocabulary | PartialVocabulary(_inserted_ids(model.config, vocab_size), vocab_size)
    return used


def _columns(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns whose ids are rows of the input embedding, and which of them need not be there.

    Of a decoder with an embedding of its own (EncoderDecoderModel), what it reads and writes is of another vocabulary.
    """
    decoder: Any = model.get_decoder() if getattr(model.config, "is_encoder_decoder", False) else None
    own = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else None
    if own is not None and own.weight is not model.get_input_embeddings().weight:
        return DEFAULT_COLUMNS[:1], ()
    labels = () if model.get_output_embeddings() is None else ("labels",)
    return (*DEFAULT_COLUMNS, *labels), labels


def _inserted_ids(config: Any, vocab_size: int) -> list[int]:
    values = [getattr(config, name, None) for name in INSERTED_IDS]
    flat = [one for value in values for one in (value if isinstance(value, Iterable) else [value])]
    return [one for one in flat if isinstance(one, int) and 0 <= one < vocab_size]
