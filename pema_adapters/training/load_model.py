"""Load a model with a partial embedding, for full fine-tuning with PEMA (the paper's setting)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pema_adapters.errors import SurgeryError
from pema_adapters.training import upstream
from pema_adapters.training.base.find_base import StoredMatrix
from pema_adapters.training.base.model_vocabulary import get_input_embedding
from pema_adapters.training.embedding.conversion import convert_all, find_aliases, find_embeddings
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.guards import refuse_hub_kernel
from pema_adapters.training.output.tied_head import can_convert_heads, convert_heads, find_heads
from pema_adapters.training.shrink import shrink_embeddings

OFFLOADED = ("cpu", "disk")
"""Device-map entries of weights that are stored here but computed with on another device, if there is one."""


def load_model(
    model_class: Any,
    pretrained_model_name_or_path: Any,
    vocabulary: Any,
    *,
    output_embeddings: Literal["tied", "full"] | None = None,
    output_storage: Literal["auto", "disk", "host", "device"] = "auto",
    **kwargs: Any,
) -> Any:
    """Load a model like `model_class.from_pretrained`, but only the rows of `vocabulary` of its embedding matrix.

    The matrix [V, d] is never allocated, for the input or for an output that is tied to it, from safetensors or `.bin`
    files alike. The model is loaded whole and then shrunk where that is impossible: a matrix that the checkpoint lacks,
    or stores in another shape or under another name; files that cannot be read in place (pickles from before PyTorch
    1.6, GGUF, TensorFlow); a `state_dict`; an embedding that is quantised or split between processes.

    The embedding is trainable as K rows, under its usual name, in the dtype and on the device that `from_pretrained`
    would choose (if a device map offloads it, on the device that computes). A new head gets the same random weights as
    from `from_pretrained`. `save_delta` saves what training changed.

    Args:
        model_class: a Transformers model class or Auto class, or AutoAdapterModel.
        pretrained_model_name_or_path: a local folder or a Hub id.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one.
        output_embeddings: as in `PEMAConfig`, for a language model.
        output_storage: likewise.
        kwargs: passed to `from_pretrained`.

    Returns:
        The model; with `output_loading_info=True` a pair, as `from_pretrained` returns.

    Raises:
        SurgeryError, VocabularyError: as in `shrink_embeddings`.
        FormatError: the config names an attention kernel on the Hub, whose code Transformers would run.
    """
    if hasattr(kwargs.get("config"), "sub_configs") and "attn_implementation" not in kwargs:
        refuse_hub_kernel(kwargs["config"], "config")
    with upstream.override(upstream.deferred_matrices, []) as deferred:
        loaded = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    for matrix in deferred:
        matrix.pin(model)
    shrink_embeddings(model, None, vocabulary, output_embeddings=output_embeddings, output_storage=output_storage)
    return loaded


@dataclass
class DeferredMatrix:
    """A matrix [V, d] that `from_pretrained` does not load.

    Attributes:
        embedding: the module that it belongs to.
        matrix: its rows in the checkpoint.
        placeholder: a Parameter [0, d] with the dtype, device and requires_grad of the matrix.
    """

    embedding: nn.Embedding
    matrix: StoredMatrix
    placeholder: nn.Parameter

    def detach(self, model: Any) -> list[str]:
        """Remove the weight from all modules that share it. Returns the names of these weights."""
        owner = convert_all(model, self.embedding)
        heads = list(convert_heads(model, owner).values())
        owner.base = self.matrix.rows
        sharing = [*find_aliases(model, owner).values(), *heads]
        for module in sharing:
            del module._parameters["weight"]
            upstream.mark_as_initialized(module)
        for head in heads:
            head.__dict__["weight"] = torch.empty(0, owner.embedding_dim)  # ModernBERT initializes it from outside
        modules = model.named_modules(remove_duplicate=False)
        return [f"{name}.weight" for name, module in modules if module in sharing]

    def attach(self, model: Any) -> None:
        """Give these embeddings a weight again, without rows; `model` has all its other weights."""
        base = self.matrix.make_base(model)
        assert isinstance(self.embedding, PartialEmbedding)
        for alias in find_aliases(model, self.embedding).values():
            alias.register_parameter("weight", self.placeholder)
        for head in find_heads(model, self.embedding).values():
            del head.__dict__["weight"]
        self.embedding.shrink(base)

    def pin(self, model: Any) -> None:
        """Keep that weight in place, also where accelerate has offloaded the module."""
        assert isinstance(self.embedding, PartialEmbedding)
        for alias in find_aliases(model, self.embedding).values():
            upstream.pin_weight(alias, self.placeholder)


@contextmanager
def defer_matrix(
    model: Any, state_dict: Any, files: Sequence[str] | None, name: Any, **load_options: Any
) -> Iterator[None]:
    """Load the weights of `model` in the block, without its embedding matrix if possible.

    The arguments are those of `_load_pretrained_model`; `model` is on the meta device. The matrix, if deferred, is
    added to the list `deferred_matrices`.
    """
    deferred = upstream.deferred_matrices.get()
    matrix = None if state_dict is not None or not files else _find_matrix(model, files, load_options)
    if matrix is None or deferred is None:
        yield
        return
    with upstream.ignore_unexpected_tensors(model, matrix.detach(model)):
        yield
    matrix.attach(model)  # before the weights are tied, and before accelerate offloads some
    deferred.append(matrix)


def _find_matrix(model: Any, files: Sequence[str], load_options: Mapping[str, Any]) -> DeferredMatrix | None:
    """Return the matrix to defer; None if the model needs it or it cannot be read in place."""
    try:
        embedding = get_input_embedding(model)
    except SurgeryError:
        return None
    if not embedding.weight.is_meta or not can_convert_heads(model, embedding):
        return None
    name, name_in_base = (f"{_find_name(root, embedding)}.weight" for root in (model, model.base_model))
    matrix = StoredMatrix.find(files, model.base_model_prefix, name_in_base, tuple(embedding.weight.shape))
    dtype = None if matrix is None else upstream.resolve_load_dtype(model, name, matrix.rows.dtype, load_options)
    if matrix is None or dtype is None or matrix.is_among(_find_renamed(matrix, load_options)):
        return None
    device = _choose_device(load_options.get("device_map"), name)
    rows = torch.empty(0, embedding.embedding_dim, dtype=dtype, device=device)
    return DeferredMatrix(embedding, matrix, nn.Parameter(rows, embedding.weight.requires_grad))


def _find_renamed(matrix: StoredMatrix, load_options: Mapping[str, Any]) -> list[str]:
    renamed = upstream.find_renamed_tensors(matrix.checkpoint.tensors, load_options.get("key_mapping"))
    return [*renamed, *renamed.values()]


def _find_name(root: nn.Module, embedding: nn.Embedding) -> str:
    return next(iter(find_embeddings(root, embedding)))


def _choose_device(device_map: Mapping[str, Any] | None, name: str) -> Any:
    """Return the device that computes with the parameter `name`, according to a device map."""
    if not device_map:
        return "cpu"
    prefixes = [prefix for prefix in device_map if not prefix or name.startswith(prefix + ".")]
    device = device_map[max(prefixes, key=len)] if prefixes else "cpu"
    computing = [each for each in device_map.values() if str(each) not in OFFLOADED]
    return next(iter(computing), "cpu") if str(device) in OFFLOADED else device
