"""Saving a shrunk model: as a complete checkpoint, streamed from the base, or as a small delta."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pema_adapters.errors import SurgeryError
from pema_adapters.training.base.find_base import Base
from pema_adapters.training.base.mapped_rows import MappedMatrix
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.output.tied_head import heads_of
from pema_adapters.training.upstream import private_names as _upstream

logger = logging.getLogger(__name__)

OWN = ("token_ids", "fingerprint")


def save_delta(model: Any, save_directory: str | Path, **save_kwargs: Any) -> None:
    """Save what full fine-tuning trained: every trained weight, and the embedding as K rows with their token ids.

    The folder is what a Trainer writes as a checkpoint of such a model, less the frozen weights. `pema-merge` turns
    it and the base into a complete checkpoint.

    Args:
        model: a model from `load_model`, or shrunk with `shrink_embeddings(model, None, vocabulary)`.
        save_directory: made if need be.
        save_kwargs: passed on to `save_pretrained` (max_shard_size, say).

    Raises:
        SurgeryError: the model has no partial embedding of its own, or the folder is that of its base.
    """
    owner = shrunk_embedding(model)
    if owner is None or owner.token_ids is None:
        raise SurgeryError(
            f"{type(model).__name__} has no partial embedding of its own to save: get one from "
            "pema_adapters.load_model(...), or save an adapter with model.save_adapter(folder, name)"
        )
    base_file = _base(owner).matrix.lies_in(Path(save_directory))
    if base_file is not None:
        raise SurgeryError(
            f"save_delta to {save_directory} would overwrite the base {base_file}: choose another folder"
        )
    with _upstream.during(_upstream.writing_trainer_checkpoint):
        model.save_pretrained(save_directory, state_dict=_trained(model), **save_kwargs)


@contextmanager
def full_state_dict(
    model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None
) -> Iterator[dict[str, Tensor] | None]:
    """The state of a shrunk model as the unshrunk one would give it, for the time of the `with` block.

    The matrix [V, d] is a tensor over an unnamed file in `folder`: base rows, with the model's own trained rows
    written in. An adapter's rows stay in the adapter. If the file that holds the base rows is about to be
    overwritten, it is moved out of the way, so that the model goes on reading the old one. A model that is not
    shrunk: `state_dict` as given.

    Raises: InputChangedError, before anything is written, where the base is no longer what it was.
    """
    owner = shrunk_embedding(model)
    if owner is None:
        yield state_dict
        return
    _base(owner).matrix.check()
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    matrix = _mapped_matrix(owner, folder)
    for prefix in _prefixes(model, owner):
        if prefix + "weight" in state:
            state[prefix + "weight"] = matrix.tensor
        for name in OWN:
            state.pop(prefix + name, None)
    for name, head in heads_of(model, owner).items():
        state[name + ".weight"] = matrix.tensor if owner.ties_output or owner.token_ids is None else head.matrix
    with _out_of_the_way(_base(owner).matrix.lies_in(folder)):
        yield state


def warn_of_unmerged_rows(model: Any, folder: Any) -> None:
    """Warn that save_pretrained writes the base's embedding, without the trained rows of adapters.

    AutoAdapterModel does read them.
    """
    layer = _upstream.pema_layer(model)
    if layer is None or layer.merged is not None or _upstream.has_flexible_heads(model):
        return
    names = [name for name in layer.with_rows() if layer.rows_of(name).trainable]
    if names:
        logger.warning(
            "save_pretrained: the embedding in %s is the base's, without the trained rows of adapter %s: call "
            "model.merge_adapter(%r) before (and reset_adapter() after), or save_adapter and merge with pema-merge",
            folder, ", ".join(map(repr, names)), names[0],
        )  # fmt: skip


def own_rows_once(model: nn.Module, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The state of a model with token ids and fingerprint under one name, where one embedding has several (T5's)."""
    owner = shrunk_embedding(model)
    if owner is None or owner.token_ids is None:
        return state_dict
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for prefix in _prefixes(model, owner)[1:]:
        for name in OWN:
            state.pop(prefix + name, None)
    return state


def shrunk_embedding(model: Any) -> PartialEmbedding | None:
    """The partial embedding that speaks for the model, None where no matrix was let go."""
    found = (module.owner for module in model.modules() if isinstance(module, PartialEmbedding))
    owner = next(found, None)
    return owner if owner is not None and owner.is_shrunk else None


def _base(owner: PartialEmbedding) -> Base:
    assert isinstance(owner.base, Base)
    return owner.base


def _mapped_matrix(owner: PartialEmbedding, folder: Path) -> MappedMatrix:
    shape = (owner.num_embeddings, owner.embedding_dim)
    matrix = MappedMatrix(folder, _base(owner).matrix.blocks(), shape, owner.weight.dtype)
    if owner.token_ids is not None:
        matrix.write(owner.token_ids, owner.weight)
    return matrix


def _prefixes(model: nn.Module, owner: PartialEmbedding) -> list[str]:
    """Every name under which the state holds the embedding: adapters registers it a second time for prompt tuning."""
    return [
        name + "."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PartialEmbedding) and module.owner is owner
    ]


def _trained(model: Any) -> dict[str, Tensor]:
    """The state without frozen weights and without what adapters added; the embedding is in, whatever it is."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    inside = "" if model.base_model is model else model.base_model_prefix + "."
    added = {inside + name for name in _upstream.adapter_tensor_names(model)}
    owner = shrunk_embedding(model)
    keep = {prefix + "weight" for prefix in _prefixes(model, owner)} if owner else set()
    if owner is not None:
        keep |= {inside + name for name in _base(owner).drawn}  # no base will have them
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in added and (name in keep or name not in frozen)
    }


@contextmanager
def _out_of_the_way(path: Path | None) -> Iterator[None]:
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
