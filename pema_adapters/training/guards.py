"""What Transformers may not do to a model whose embedding matrix is not in memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from pema_adapters.errors import FormatError, SurgeryError
from pema_adapters.training.base.model_vocabulary import input_embedding
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.output.tied_head import PartialOutput
from pema_adapters.training.upstream import private_names as _upstream


def refuse_resize(model: Any, new_num_tokens: int | None) -> None:
    """Raise SurgeryError where `resize_token_embeddings` would work on a few rows as if they were the matrix."""
    try:
        embedding = input_embedding(model)
    except SurgeryError:
        return
    layer = _upstream.pema_layer(model)
    partial = isinstance(embedding, PartialEmbedding) and embedding.is_shrunk
    if new_num_tokens in (None, embedding.num_embeddings):
        return
    if layer is not None:
        layer.refuse_while_merged(f"resize_token_embeddings to {new_num_tokens}")
    if not (partial or (layer and layer.with_rows())):
        return
    raise SurgeryError(
        f"resize_token_embeddings to {new_num_tokens}: the model holds PEMA rows of a vocabulary of "
        f"{embedding.num_embeddings}: resize before shrink_embeddings, or call restore_embeddings(model) first"
    )


def refuse_hub_kernel(config: Any, where: str) -> None:
    """Raise FormatError where a config names an attention kernel on the Hub, whose code Transformers would run."""
    found = _upstream.find_hub_kernel(config)
    if found is not None:
        raise FormatError(
            f"{where}: {found[0]} names {found[1]!r}, a kernel on the Hub whose code Transformers would download and "
            "run (CVE-2026-4372); remove this field, and pass attn_implementation to load_model if you trust it"
        )


def refuse_tie(model: Any, embedding: nn.Module, head: nn.Module) -> None:
    """Raise SurgeryError where Transformers is about to tie a head to a matrix that is not in memory."""
    if isinstance(embedding, PartialEmbedding) and (embedding.is_shrunk or "weight" not in embedding._parameters):
        name = next((name for name, module in model.named_modules() if module is head), "")
        raise SurgeryError(_tied(name, head, embedding))


def is_tied_already(embedding: nn.Module, head: nn.Module) -> bool:
    """Whether `head` shares the matrix of a partial `embedding` in the way that is possible."""
    if not isinstance(embedding, PartialEmbedding) or not embedding.is_shrunk:
        return False
    if isinstance(head, PartialEmbedding):
        return head.owner is embedding.owner
    return isinstance(head, PartialOutput) and head.embedding is embedding.owner


def _tied(name: str, head: nn.Module, embedding: nn.Embedding) -> str:
    return (
        f"the head {name!r} ({type(head).__name__}) is tied to the input embedding and needs all "
        f"{embedding.num_embeddings} rows, which are not in memory: add it before shrink_embeddings, or call "
        "restore_embeddings(model) first"
    )
