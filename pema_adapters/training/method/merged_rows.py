"""`merge_adapter` and `reset_adapter` for PEMA: an adapter's rows in the matrix E [V, d], and out of it again.

While they are in, the model is an ordinary full one, and the adapter's own rows wait where they are: they neither lie
over the matrix nor train.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from adapters import LoRAConfig
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.training.base.find_base import Base
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.method.config import PEMAConfig
from pema_adapters.training.output.full_matrix import copy_base, is_untied, load_full_matrix
from pema_adapters.training.output.tied_head import heads_of
from pema_adapters.training.upstream import private_names as _upstream

logger = logging.getLogger(__name__)

_MERGED = (PEMAConfig, LoRAConfig)
"""Methods that merge_adapter writes into weights; DoRA, (IA)^3 and VeRA are LoRAConfigs, too."""


@dataclass(frozen=True)
class MergedRows:
    """What an embedding was before the rows of `adapter_name` were merged into it.

    Args:
        adapter_name: the adapter.
        base: of a shrunk embedding; None where the matrix was in memory.
        own: state of the embedding's own rows (full fine-tuning), empty where it has none.
        grows_over: the base that own rows grow from, if they do.
        token_ids: int64 [K], of the merged rows.
        rows: what a matrix in memory held in their place, [K, d].
        tie_word_embeddings: as the config had it.
    """

    adapter_name: str
    base: Base | None
    own: dict[str, Tensor]
    grows_over: Any
    token_ids: Tensor
    rows: Tensor
    tie_word_embeddings: bool


def check_merge(model: Any, adapter_name: str) -> None:
    """Raise SurgeryError where merging an adapter of a model with PEMA would not give what it computes."""
    layer = _upstream.pema_layer(model)
    if layer is None:
        return
    if adapter_name not in model.adapters_config.adapters:
        found = ", ".join(model.adapters_config.adapters)
        raise SurgeryError(f"merge_adapter: no adapter {adapter_name!r} on this model (found: {found})")
    if layer.merged is not None and layer.merged.adapter_name != adapter_name:
        layer.refuse_while_merged(f"merge_adapter({adapter_name!r})")
    changed = [each for each in _upstream.lora_layers(model) if adapter_name in each.loras]
    if adapter_name in layer.adapters and not all(each.weight.is_floating_point() for each in changed):
        raise SurgeryError(
            f"merge_adapter({adapter_name!r}): the base is quantised, and merged weights would be rounded to its few "
            "bits: save_adapter, and merge into the original checkpoint with pema-merge"
        )


def merge_rows(model: Any, adapter_name: str) -> None:
    """Write the rows of an adapter into the matrix E [V, d], which is in memory again; tied heads follow.

    An adapter without PEMA, without rows yet, or merged already: nothing happens.
    """
    layer = _upstream.pema_layer(model)
    if layer is None or layer.merged is not None or adapter_name not in layer.with_rows():
        return
    rows, owner = layer.rows_of(adapter_name), layer.embedding
    before = _remember(model, owner, adapter_name, rows.token_ids.long())
    untied = bool(heads_of(model, owner)) and is_untied(model, rows)
    load_full_matrix(model, owner, rows)
    if untied:
        model.config.tie_word_embeddings = False
    layer.merged = before
    _warn_of_rest(model, adapter_name)


def _warn_of_rest(model: Any, adapter_name: str) -> None:
    """Name the methods beside PEMA that have no place in the weights of the base."""
    config = model.adapters_config.get(adapter_name)
    rest = [type(part).__name__ for part in getattr(config, "configs", ()) if not isinstance(part, _MERGED)]
    if rest:
        logger.warning(
            "merge_adapter: %s of adapter %r cannot be merged into weights and stays an adapter, which a checkpoint "
            "by itself is without: save_adapter, and use pema-merge, which leaves it in a folder beside the "
            "merged checkpoint", " and ".join(rest), adapter_name,
        )  # fmt: skip


def reset_rows(model: Any) -> None:
    """Undo `merge_rows`, exactly: the model is shrunk again, and the rows train on as before."""
    layer = _upstream.pema_layer(model)
    if layer is None or layer.merged is None:
        return
    before, owner = layer.merged, layer.embedding
    layer.merged = None
    _take_out(model, owner, before)
    model.config.tie_word_embeddings = before.tie_word_embeddings


def _remember(model: Any, owner: PartialEmbedding, adapter_name: str, token_ids: Tensor) -> MergedRows:
    base = owner.base if isinstance(owner.base, Base) else None
    own = {} if owner.token_ids is None else {name: each.clone() for name, each in owner.state_dict().items()}
    replaced = owner.weight.new_empty(0) if base else owner.weight.detach()[token_ids]
    ties = model.config.tie_word_embeddings
    return MergedRows(adapter_name, base, own, owner.grows_over, token_ids.clone(), replaced, ties)


@torch.no_grad()
def _take_out(model: Any, owner: PartialEmbedding, before: MergedRows) -> None:
    heads = heads_of(model, owner).values()
    was_untied = model.config.tie_word_embeddings != before.tie_word_embeddings
    if before.base is None:
        owner.weight[before.token_ids] = before.rows.to(owner.weight.device)
        for head in heads if was_untied else ():
            head.tie()
        return
    copy_base(before.base, owner.weight)
    for head in heads:
        head.hold_base()
    owner.shrink(before.base)
    if before.own:
        owner.set_rows(before.own["token_ids"], before.own["weight"], before.own["fingerprint"])
        owner.grows_over = before.grows_over
