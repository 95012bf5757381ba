"""Guards: refuse what Transformers would do wrong while a model's embedding matrix is not in memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from pema_adapters.errors import FormatError, SurgeryError
from pema_adapters.training import upstream
from pema_adapters.training.base.model_vocabulary import get_input_embedding
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.output.tied_head import PartialOutput


def refuse_resize(model: Any, new_num_tokens: int | None) -> None:
    """Refuse `resize_token_embeddings` on a model with PEMA rows.

    Raises:
        SurgeryError: it would resize the K rows in memory as if they were the matrix [V, d].
    """
    try:
        embedding = get_input_embedding(model)
    except SurgeryError:
        return
    layer = upstream.pema_layer(model)
    partial = isinstance(embedding, PartialEmbedding) and embedding.is_shrunk
    if new_num_tokens in (None, embedding.num_embeddings):
        return
    if layer is not None:
        layer.refuse_while_merged(f"resize_token_embeddings to {new_num_tokens}")
    if not (partial or (layer and layer.adapters_with_rows())):
        return
    raise SurgeryError(
        f"resize_token_embeddings to {new_num_tokens}: the model holds PEMA rows of a vocabulary of "
        f"{embedding.num_embeddings}: resize before shrink_embeddings, or call restore_embeddings(model) first"
    )


def refuse_hub_kernel(config: Any, where: str) -> None:
    """Refuse a config that names an attention kernel on the Hub, whose code Transformers would run.

    Args:
        config: a dictionary or a `PretrainedConfig`.
        where: the start of the message, a file name, say.

    Raises:
        FormatError: the field, its value, and what to do.
    """
    found = upstream.find_hub_kernel(config)
    if found is not None:
        raise FormatError(
            f"{where}: {found[0]} names {found[1]!r}, a kernel on the Hub whose code Transformers would download and "
            "run (CVE-2026-4372); remove this field, and pass attn_implementation to load_model if you trust it"
        )


def refuse_tie(model: Any, embedding: nn.Module, head: nn.Module) -> None:
    """Refuse to tie a head to an embedding whose matrix is not in memory.

    Raises:
        SurgeryError: the head, by name, and what to do.
    """
    if isinstance(embedding, PartialEmbedding) and (embedding.is_shrunk or "weight" not in embedding._parameters):
        name = next((name for name, module in model.named_modules() if module is head), "")
        raise SurgeryError(_tie_message(name, head, embedding))


def is_tied(embedding: nn.Module, head: nn.Module) -> bool:
    """Return whether `head` shares the matrix of a shrunk `embedding` already."""
    if not isinstance(embedding, PartialEmbedding) or not embedding.is_shrunk:
        return False
    if isinstance(head, PartialEmbedding):
        return head.owner is embedding.owner
    return isinstance(head, PartialOutput) and head.embedding is embedding.owner


def _tie_message(name: str, head: nn.Module, embedding: nn.Embedding) -> str:
    return (
        f"the head {name!r} ({type(head).__name__}) is tied to the input embedding and needs all "
        f"{embedding.num_embeddings} rows, which are not in memory: add it before shrink_embeddings, or call "
        "restore_embeddings(model) first"
    )
