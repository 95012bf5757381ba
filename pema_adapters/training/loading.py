"""Loading a model with a partial embedding, for full fine-tuning with PEMA (the paper's setting)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from pema_adapters.errors import SurgeryError
from pema_adapters.training import _upstream
from pema_adapters.training.base import base_as_loaded
from pema_adapters.training.embedding import PartialEmbedding, convert_all, parts_of
from pema_adapters.training.layer import input_embedding
from pema_adapters.training.output import has_tied_head
from pema_adapters.training.surgery import shrink_embeddings


def load_model(model_class: Any, pretrained_model_name_or_path: Any, vocabulary: Any, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)` with only the rows of `vocabulary`.

    Of a safetensors checkpoint, nothing but these rows is read of the matrix [V, d], and the matrix is never allocated.
    Of any other, the model is loaded whole and shrunk; so is a language model whose output is tied to the embedding:
    the output needs the matrix, if only to read. The embedding is trainable as K rows, under its usual name;
    `save_delta` saves what training changed. Random weights of a new head are those that from_pretrained draws.

    Args:
        model_class: a Transformers model class or Auto class, or AutoAdapterModel.
        pretrained_model_name_or_path: a local folder or a Hub id.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one.
        kwargs: for `from_pretrained`.

    Returns:
        The model (with `output_loading_info=True` a pair, as from_pretrained returns).

    Raises:
        SurgeryError, VocabularyError: as `shrink_embeddings`.
    """
    with _upstream.during(_upstream.loading_without_matrix):
        loaded = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
    if isinstance(input_embedding(_model(loaded)), PartialEmbedding) and not _give_base(_model(loaded)):
        loaded = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
    shrink_embeddings(_model(loaded), None, vocabulary)
    return loaded


def leave_out_matrix(model: Any) -> None:
    """Take the weight out of a model's embedding, while the model is on the meta device, so that none is loaded."""
    try:
        embedding = input_embedding(model)
    except SurgeryError:
        return
    if has_tied_head(model, embedding):  # which needs all of the matrix
        return
    owner = convert_all(model, embedding)
    for part in parts_of(model, owner).values():
        del part._parameters["weight"]
        _upstream.mark_as_initialized(part)
    parts = [name for name, part in model.named_modules() if isinstance(part, PartialEmbedding)]
    _upstream.expect_no_tensor(model, [name.split(".")[-1] + ".weight" for name in parts])


def _give_base(model: Any) -> bool:
    """Give the embedding its base, no rows, and a place for some. Returns whether the checkpoint can be read from."""
    embedding = cast(PartialEmbedding, input_embedding(model))
    parts = parts_of(model.base_model, embedding.owner)
    name = next(name for name, part in parts.items() if part is embedding)
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    place = nn.Parameter(torch.empty(0, shape[1], dtype=model.dtype, device=_device(model, name)))
    for part in parts.values():
        part.register_parameter("weight", place)
    base = base_as_loaded(model, f"{name}.weight", shape)
    if base is not None:
        embedding.owner.shrink(base)
    return base is not None


def _device(model: Any, name: str) -> Any:
    """Where a device map puts the embedding; else where the model is."""
    placed = getattr(model, "hf_device_map", None) or {}
    inside = [where for where in placed if f"{model.base_model_prefix}.{name}".startswith(where)]
    return placed[max(inside, key=len)] if inside else model.device


def _model(loaded: Any) -> Any:
    return loaded[0] if isinstance(loaded, tuple) else loaded
