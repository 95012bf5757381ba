"""Save a shrunk model: as a complete checkpoint, streamed from the base, or as a small delta."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pema_adapters.errors import SurgeryError
from pema_adapters.training import upstream
from pema_adapters.training.base.base_model import BaseModel
from pema_adapters.training.base.mapped_rows import ScratchMatrix
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.output.tied_head import find_heads

logger = logging.getLogger(__name__)

ROW_BUFFERS = ("token_ids", "fingerprint")
"""Tensors of a partial embedding that a full one does not have."""


def save_delta(model: Any, save_directory: str | Path, **save_kwargs: Any) -> None:
    """Save the result of full fine-tuning: every trained weight, and the embedding as K rows with their token ids.

    The folder is like a Trainer's checkpoint of this model, without the frozen weights. `pema-merge` makes a complete
    checkpoint from it and the base.

    Args:
        model: a model from `load_model`, or one shrunk with `shrink_embeddings(model, None, vocabulary)`.
        save_directory: created if it does not exist.
        save_kwargs: passed to `save_pretrained` (max_shard_size, say).

    Raises:
        SurgeryError: the model has no partial embedding of its own, or the folder is that of its base.
    """
    owner = find_shrunk_embedding(model)
    if owner is None or owner.token_ids is None:
        raise SurgeryError(
            f"{type(model).__name__} has no partial embedding of its own to save: get one from "
            "pema_adapters.load_model(...), or save an adapter with model.save_adapter(folder, name)"
        )
    base_file = _get_base(owner).matrix.find_in(Path(save_directory))
    if base_file is not None:
        raise SurgeryError(
            f"save_delta to {save_directory} would overwrite the base {base_file}: choose another folder"
        )
    with upstream.override(upstream.writing_trainer_checkpoint):
        model.save_pretrained(save_directory, state_dict=_build_trained_state(model), **save_kwargs)


@contextmanager
def build_full_state_dict(
    model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None
) -> Iterator[dict[str, Tensor] | None]:
    """Build the state dict of a shrunk model as if it had the full matrix, for use inside the block.

    The matrix [V, d] is a tensor over an unnamed file in `folder`: base rows, with the model's own trained rows
    written in. An adapter's rows stay in the adapter. If the block is about to overwrite the file of the base rows,
    that file is moved aside first, so that the model can still read it.

    Args:
        model: the model.
        folder: where the checkpoint is saved.
        state_dict: the state to complete; None: the model's.

    Yields:
        The complete state; `state_dict` itself if the model is not shrunk.

    Raises:
        InputChangedError: the base has changed; nothing is written.
    """
    owner = find_shrunk_embedding(model)
    if owner is None:
        yield state_dict
        return
    _get_base(owner).matrix.check()
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    matrix = _build_matrix(owner, folder)
    for prefix in _find_prefixes(model, owner):
        if prefix + "weight" in state:
            state[prefix + "weight"] = matrix.tensor
        for name in ROW_BUFFERS:
            state.pop(prefix + name, None)
    heads = find_heads(model, owner)
    if heads and not owner.tied_to_output and owner.token_ids is not None:
        matrix = _build_matrix(owner, folder, with_own_rows=False)
    state |= {name + ".weight": matrix.tensor for name in heads}
    with _move_aside(_get_base(owner).matrix.find_in(folder)):
        yield state


def warn_of_unmerged_rows(model: Any, folder: Any) -> None:
    """Warn that save_pretrained writes the base's embedding, without the trained rows of adapters.

    An AutoAdapterModel is an exception: its checkpoints contain the adapters.
    """
    layer = upstream.pema_layer(model)
    if layer is None or layer.merged is not None or upstream.has_flexible_heads(model):
        return
    names = [name for name in layer.adapters_with_rows() if layer.get_rows(name).trainable]
    if names:
        logger.warning(
            "save_pretrained: the embedding in %s is the base's, without the trained rows of adapter %s: call "
            "model.merge_adapter(%r) before (and reset_adapter() after), or save_adapter and merge with pema-merge",
            folder, ", ".join(map(repr, names)), names[0],
        )  # fmt: skip


def drop_duplicate_rows(model: nn.Module, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return the state with token ids and fingerprint under one name, where an embedding has several (T5's)."""
    owner = find_shrunk_embedding(model)
    if owner is None or owner.token_ids is None:
        return state_dict
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for prefix in _find_prefixes(model, owner)[1:]:
        for name in ROW_BUFFERS:
            state.pop(prefix + name, None)
    return state


def find_shrunk_embedding(model: Any) -> PartialEmbedding | None:
    """Return the owner of the model's partial embeddings, None if the full matrix is in memory."""
    found = (module.owner for module in model.modules() if isinstance(module, PartialEmbedding))
    owner = next(found, None)
    return owner if owner is not None and owner.is_shrunk else None


def _get_base(owner: PartialEmbedding) -> BaseModel:
    assert isinstance(owner.base, BaseModel)
    return owner.base


def _build_matrix(owner: PartialEmbedding, folder: Path, with_own_rows: bool = True) -> ScratchMatrix:
    shape = (owner.num_embeddings, owner.embedding_dim)
    matrix = ScratchMatrix(folder, _get_base(owner).matrix.iterate_blocks(), shape, owner.weight.dtype)
    if with_own_rows and owner.token_ids is not None:
        matrix.write(owner.token_ids, owner.weight)
    return matrix


def _find_prefixes(model: nn.Module, owner: PartialEmbedding) -> list[str]:
    """Return every prefix of the embedding in the state: adapters registers it a second time for prompt tuning."""
    return [
        name + "."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PartialEmbedding) and module.owner is owner
    ]


def _build_trained_state(model: Any) -> dict[str, Tensor]:
    """Return the state of all trained weights and the embedding, without the tensors that adapters added."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    inside = "" if model.base_model is model else model.base_model_prefix + "."
    added = {inside + name for name in upstream.find_adapter_tensors(model)}
    owner = find_shrunk_embedding(model)
    keep = {prefix + "weight" for prefix in _find_prefixes(model, owner)} if owner else set()
    if owner is not None:
        keep |= {inside + name for name in _get_base(owner).newly_initialized}  # the base lacks them
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in added and (name in keep or name not in frozen)
    }


@contextmanager
def _move_aside(path: Path | None) -> Iterator[None]:
    """Rename `path` inside the block; delete it afterwards, or restore it if the block fails."""
    if path is None:
        yield
        return
    aside = path.with_name(f".{path.name}.replaced")
    path.rename(aside)
    try:
        yield
    except BaseException:
        aside.replace(path)
        raise
    aside.unlink()
