"""Loading a model with a partial embedding, for full fine-tuning with PEMA (the paper's setting)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pema_adapters.errors import SurgeryError
from pema_adapters.training.base.find_base import StoredMatrix
from pema_adapters.training.base.model_vocabulary import input_embedding
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding, convert_all, parts_of, sites
from pema_adapters.training.guards import refuse_hub_kernel
from pema_adapters.training.output.tied_head import has_tied_head
from pema_adapters.training.shrink import shrink_embeddings
from pema_adapters.training.upstream import private_names as _upstream

OFFLOADED = ("cpu", "disk")
"""Where a device map keeps weights that are computed with elsewhere, if it names another device."""


def load_model(model_class: Any, pretrained_model_name_or_path: Any, vocabulary: Any, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)` with only the rows of `vocabulary`.

    Nothing but these rows is read of the matrix [V, d], and the matrix is never allocated, whichever safetensors or
    `.bin` files from_pretrained chooses. Loaded whole and then shrunk are: a language model whose output is tied to the
    embedding, for the output needs the matrix, if only to read; a matrix that the checkpoint lacks, or has in another
    shape or under another name; files that cannot be read in place (pickles from before PyTorch 1.6, GGUF, TensorFlow);
    a `state_dict`; an embedding that is itself quantised or split between processes.

    The embedding is trainable as K rows, under its usual name, in the dtype and on the device that from_pretrained
    would give it; on the device that computes, where a device map offloads it. `save_delta` saves what training
    changed. Random weights of a new head are those that from_pretrained draws.

    Args:
        model_class: a Transformers model class or Auto class, or AutoAdapterModel.
        pretrained_model_name_or_path: a local folder or a Hub id.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one.
        kwargs: for `from_pretrained`.

    Returns:
        The model (with `output_loading_info=True` a pair, as from_pretrained returns).

    Raises:
        SurgeryError, VocabularyError: as `shrink_embeddings`.
        FormatError: the config names an attention kernel on the Hub, whose code Transformers would run.
    """
    if hasattr(kwargs.get("config"), "sub_configs") and "attn_implementation" not in kwargs:
        refuse_hub_kernel(kwargs["config"], "config")
    with _upstream.during(_upstream.loading_without_matrix, []) as left_out:
        loaded = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for one in left_out:
        one.keep_place(model)
    shrink_embeddings(model, None, vocabulary)
    return loaded


@dataclass
class LeftOut:
    """A matrix [V, d] that is not loaded.

    place: a Parameter [0, d] as the matrix would be one.
    """

    embedding: nn.Embedding
    matrix: StoredMatrix
    place: nn.Parameter

    def take_out(self, model: Any) -> list[str]:
        """Take the weight out of all embeddings that share it. Returns the names of these weights."""
        owner = convert_all(model, self.embedding)
        owner.base = self.matrix.rows
        parts = list(parts_of(model, owner).values())
        for part in parts:
            del part._parameters["weight"]
            _upstream.mark_as_initialized(part)
        return [f"{name}.weight" for name, one in model.named_modules(remove_duplicate=False) if one in parts]

    def give_place(self, model: Any) -> None:
        """Let them have a weight again, with no rows yet; `model` has all its other weights."""
        base = self.matrix.base_of(model)
        assert isinstance(self.embedding, PartialEmbedding)
        for part in parts_of(model, self.embedding).values():
            part.register_parameter("weight", self.place)
        self.embedding.shrink(base)

    def keep_place(self, model: Any) -> None:
        """Let them keep it, whatever accelerate did to it."""
        assert isinstance(self.embedding, PartialEmbedding)
        for part in parts_of(model, self.embedding).values():
            _upstream.keep_loaded(part, self.place)


@contextmanager
def leaving_out_matrix(
    model: Any, state_dict: Any, files: Sequence[str] | None, name: Any, **how: Any
) -> Iterator[None]:
    """In the block `model`, which is on the meta device, gets its weights, but for the embedding matrix if possible.

    The arguments are those of `_load_pretrained_model`. What is left out goes to the list `loading_without_matrix`.
    """
    left_out = _upstream.loading_without_matrix.get()
    left = None if state_dict is not None or not files else _find(model, files, how)
    if left is None or left_out is None:
        yield
        return
    with _upstream.expecting_no_tensor(model, left.take_out(model)):
        yield
    left.give_place(model)  # before the weights are tied, and before accelerate takes some away
    left_out.append(left)


def _find(model: Any, files: Sequence[str], how: Mapping[str, Any]) -> LeftOut | None:
    """The matrix to leave out; None where it is needed, or cannot be read in place."""
    try:
        embedding = input_embedding(model)
    except SurgeryError:
        return None
    if not embedding.weight.is_meta or has_tied_head(model, embedding):
        return None
    name, within = (f"{_name(root, embedding)}.weight" for root in (model, model.base_model))
    matrix = StoredMatrix.find(files, model.base_model_prefix, within, tuple(embedding.weight.shape))
    dtype = None if matrix is None else _upstream.dtype_to_load(model, name, matrix.rows.dtype, how)
    if matrix is None or dtype is None or matrix.is_among(_renamed(matrix, how)):
        return None
    nothing = torch.empty(0, embedding.embedding_dim, dtype=dtype, device=_device(how.get("device_map"), name))
    return LeftOut(embedding, matrix, nn.Parameter(nothing, embedding.weight.requires_grad))


def _renamed(matrix: StoredMatrix, how: Mapping[str, Any]) -> list[str]:
    renamed = _upstream.renamed_on_load(matrix.checkpoint.tensors, how.get("key_mapping"))
    return [*renamed, *renamed.values()]


def _name(root: nn.Module, embedding: nn.Embedding) -> str:
    return next(iter(sites(root, embedding)))


def _device(device_map: Mapping[str, Any] | None, name: str) -> Any:
    """Where a device map has the parameter `name` computed with."""
    if not device_map:
        return "cpu"
    inside = [where for where in device_map if not where or name.startswith(where + ".")]
    device = device_map[max(inside, key=len)] if inside else "cpu"
    computing = [where for where in device_map.values() if str(where) not in OFFLOADED]
    return next(iter(computing), "cpu") if str(device) in OFFLOADED else device
