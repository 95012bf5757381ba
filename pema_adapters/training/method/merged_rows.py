"""`merge_adapter` and `reset_adapter` for PEMA: write an adapter's rows into the matrix E [V, d], and undo it exactly.

While they are merged, the model is an ordinary one with a full matrix; the adapter keeps its rows, which are inactive.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from adapters import LoRAConfig
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.training import upstream
from pema_adapters.training.base.base_model import BaseModel
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.method.config import PEMAConfig
from pema_adapters.training.output.full_matrix import copy_base_rows, is_untied, load_full_matrix
from pema_adapters.training.output.tied_head import find_heads

logger = logging.getLogger(__name__)

_MERGEABLE = (PEMAConfig, LoRAConfig)
"""Methods that merge_adapter writes into weights; DoRA, (IA)^3 and VeRA are LoRAConfigs as well."""


@dataclass(frozen=True)
class MergedRows:
    """The state of an embedding before an adapter's rows were merged into it.

    Attributes:
        adapter_name: the adapter.
        base: of a shrunk embedding; None if the matrix was in memory.
        own: state dict of the embedding's own rows (full fine-tuning), empty if it has none.
        growth_source: the base that own rows grow from, if they do.
        token_ids: int64 [K], of the merged rows.
        rows: [K, d], the rows of a matrix in memory that were overwritten.
        tie_word_embeddings: the config's value.
    """

    adapter_name: str
    base: BaseModel | None
    own: dict[str, Tensor]
    growth_source: Any
    token_ids: Tensor
    rows: Tensor
    tie_word_embeddings: bool


def check_merge(model: Any, adapter_name: str) -> None:
    """Refuse a merge, on a model with PEMA, whose result would not compute what the adapter does.

    Raises:
        SurgeryError: no such adapter, another one is merged already, or the base is quantised.
    """
    layer = upstream.pema_layer(model)
    if layer is None:
        return
    if adapter_name not in model.adapters_config.adapters:
        found = ", ".join(model.adapters_config.adapters)
        raise SurgeryError(f"merge_adapter: no adapter {adapter_name!r} on this model (found: {found})")
    if layer.merged is not None and layer.merged.adapter_name != adapter_name:
        layer.refuse_while_merged(f"merge_adapter({adapter_name!r})")
    changed = [each for each in upstream.find_lora_layers(model) if adapter_name in each.loras]
    if adapter_name in layer.adapters and not all(each.weight.is_floating_point() for each in changed):
        raise SurgeryError(
            f"merge_adapter({adapter_name!r}): the base is quantised, and merged weights would be rounded to its few "
            "bits: save_adapter, and merge into the original checkpoint with pema-merge"
        )


def merge_rows(model: Any, adapter_name: str) -> None:
    """Load the matrix E [V, d] into memory with an adapter's rows written in; tied heads share it.

    An adapter without PEMA, without rows, or merged already is left alone.
    """
    layer = upstream.pema_layer(model)
    if layer is None or layer.merged is not None or adapter_name not in layer.adapters_with_rows():
        return
    rows, owner = layer.get_rows(adapter_name), layer.embedding
    before = _snapshot(model, owner, adapter_name, rows.token_ids.long())
    untied = bool(find_heads(model, owner)) and is_untied(model, rows)
    load_full_matrix(model, owner, rows)
    if untied:
        model.config.tie_word_embeddings = False
    layer.merged = before
    _warn_of_remaining_methods(model, adapter_name)


def _warn_of_remaining_methods(model: Any, adapter_name: str) -> None:
    """Warn of the adapter's methods that cannot be merged into weights."""
    config = model.adapters_config.get(adapter_name)
    rest = [type(part).__name__ for part in getattr(config, "configs", ()) if not isinstance(part, _MERGEABLE)]
    if rest:
        logger.warning(
            "merge_adapter: %s of adapter %r cannot be merged into weights and stays an adapter, which a checkpoint "
            "does not contain: call save_adapter and use pema-merge, which leaves it in a folder beside the "
            "merged checkpoint", " and ".join(rest), adapter_name,
        )  # fmt: skip


def reset_rows(model: Any) -> None:
    """Undo `merge_rows` exactly: a model that was shrunk is shrunk again, and the rows can train on."""
    layer = upstream.pema_layer(model)
    if layer is None or layer.merged is None:
        return
    before, owner = layer.merged, layer.embedding
    layer.merged = None
    _unmerge(model, owner, before)
    model.config.tie_word_embeddings = before.tie_word_embeddings


def _snapshot(model: Any, owner: PartialEmbedding, adapter_name: str, token_ids: Tensor) -> MergedRows:
    base = owner.base if isinstance(owner.base, BaseModel) else None
    own = {} if owner.token_ids is None else {name: each.clone() for name, each in owner.state_dict().items()}
    replaced = owner.weight.new_empty(0) if base else owner.weight.detach()[token_ids]
    ties = model.config.tie_word_embeddings
    return MergedRows(adapter_name, base, own, owner.growth_source, token_ids.clone(), replaced, ties)


@torch.no_grad()
def _unmerge(model: Any, owner: PartialEmbedding, before: MergedRows) -> None:
    heads = find_heads(model, owner).values()
    was_untied = model.config.tie_word_embeddings != before.tie_word_embeddings
    if before.base is None:
        owner.weight[before.token_ids] = before.rows.to(owner.weight.device)
        for head in heads if was_untied else ():
            head.tie()
        return
    copy_base_rows(before.base, owner.weight)
    for head in heads:
        head.release()
    owner.shrink(before.base)
    if before.own:
        owner.set_rows(before.own["token_ids"], before.own["weight"], before.own["fingerprint"])
        owner.growth_source = before.growth_source
