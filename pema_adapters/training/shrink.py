"""Putting the partial embedding in the place of the full one, and back (the paper's section 4, before and after)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

import torch
from adapters import ConfigUnion
from torch import Tensor, nn

from pema_adapters.errors import SurgeryError, VocabularyError
from pema_adapters.training.base.find_base import Base, find_base
from pema_adapters.training.base.model_vocabulary import complete_vocabulary, input_embedding
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding, convert_all, parts_of, revert, sites
from pema_adapters.training.embedding.row_table import RowTable
from pema_adapters.training.method.config import PEMAConfig
from pema_adapters.training.output.full_matrix import load_full_matrix
from pema_adapters.training.output.tied_head import convert_heads, has_tied_head, revert_heads
from pema_adapters.training.upstream import private_names as _upstream
from pema_adapters.vocabulary import PartialVocabulary

logger = logging.getLogger(__name__)

GROW = "grow"
GROWING_CONFIG = f'PEMAConfig(vocabulary="{GROW}")'


def shrink_embeddings(
    model: Any,
    adapter_name: str | None,
    vocabulary: Any = None,
    *,
    output_embeddings: Literal["tied", "full"] | None = None,
) -> PartialVocabulary:
    """Keep only the rows of `vocabulary` in memory, as the trainable rows [K, d] of adapter `adapter_name`.

    The model computes the same function as before; original token ids go in. The full matrix [V, d] is let go: other
    rows are read from the checkpoint on disk when they are needed. Rows that the adapter has already are kept, trained
    as they are, and so is what an optimizer knows of them: a second stage of training may have a larger vocabulary.

    Args:
        model: a Transformers model with adapters (`adapters.init` or AutoAdapterModel); changed in place.
        adapter_name: an adapter with a `PEMAConfig`; None for full fine-tuning without adapters.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one (see `PartialVocabulary.from_dataset`). A
            `PEMAConfig(vocabulary="grow")` needs none: training adds the tokens that it meets to what is given here.
            "grow" in full fine-tuning: the same, without a config.
        output_embeddings: full fine-tuning of a language model; an adapter's `PEMAConfig` says it for adapters.

    Returns:
        The vocabulary in use: with the ids that the model inserts itself (pad, bos, eos, decoder start), and rows that
        `resize_token_embeddings` added to the checkpoint's. One that grows: as it is now.

    Raises:
        SurgeryError: no such adapter, no PEMA in it, no token embedding, one that cannot be shared with the output, or
            a vocabulary that is to grow under a head that is tied to it.
        VocabularyError: a vocabulary of another size than the model's V, or data that cannot be scanned.
    """
    embedding = input_embedding(model)
    layer = _upstream.pema_layer(model)
    if layer is not None:
        layer.refuse_while_merged("shrink_embeddings")
    holder = None if adapter_name is None else _rows_of(model, adapter_name)
    grows = _grows(model, adapter_name, vocabulary)
    ties = _output_policy(model, adapter_name, output_embeddings) != "full"
    if grows and ties:
        _refuse_growing_softmax(model, embedding)
    if vocabulary is None or _is_grow(vocabulary):
        vocabulary = PartialVocabulary([], embedding.num_embeddings)
    used = complete_vocabulary(model, embedding.num_embeddings, vocabulary)
    base = _base_of(model, embedding)
    owner = convert_all(model, embedding)
    target: RowTable = owner if holder is None else holder
    if holder is None:
        owner.ties_output = ties
    heads = convert_heads(model, owner)
    untied = _untied(model, heads) if heads and not ties else ""
    used = used | _already_in(target, owner, base, used.vocab_size)
    token_ids = torch.from_numpy(used.token_ids.copy())
    rows = _current_rows(target, owner, token_ids)
    fingerprint = base.fingerprint_for(token_ids, with_drawn=holder is not None, untied=untied)
    if not owner.is_shrunk:
        for head in heads.values():
            head.hold_base()
        owner.shrink(base)
    target.set_rows(token_ids, rows, fingerprint)
    target.grows_over = base if grows else None
    if holder is not None:
        _drop_untrained(owner, base)
    return used


def restore_embeddings(model: Any) -> None:
    """Back to a full embedding [V, d] with the active adapter's rows written in; its PEMA part is gone.

    After full fine-tuning the trained rows are written in; with no PEMA adapter active the matrix is the base's, and
    the adapters keep their rows. An adapter that had nothing but PEMA is deleted. A model that was never shrunk is
    left alone.

    Raises:
        SurgeryError: other adapters have rows of their own, which lie over the base and not over the matrix to be; or
            `merge_adapter` has merged rows already.
    """
    embedding = input_embedding(model)
    if not isinstance(embedding, PartialEmbedding):
        return
    owner, layer = embedding.owner, _upstream.pema_layer(model)
    if layer is not None:
        layer.refuse_while_merged("restore_embeddings")
    name = _active_name(layer)
    _refuse_other_rows(layer, name)
    load_full_matrix(model, owner, None if name is None else layer.rows_of(name))
    if name is not None:
        _drop_pema_part(model, name)
    if layer is None or not len(layer.adapters):
        _detach(model, owner)


def _rows_of(model: Any, adapter_name: str) -> RowTable:
    if not _upstream.has_adapters_support(model):
        raise SurgeryError(
            f"{type(model).__name__} has no adapters yet: call adapters.init(model) and "
            f'model.add_adapter("{adapter_name}", config=PEMAConfig()) first (or use load_model for full fine-tuning)'
        )
    known = list(model.adapters_config.adapters)
    if adapter_name not in known:
        raise SurgeryError(
            f"no adapter {adapter_name!r} on this model (found: {', '.join(known) or 'none'}): "
            f'call model.add_adapter("{adapter_name}", config=PEMAConfig()) first'
        )
    if model.adapters_config.match(adapter_name, PEMAConfig) is None:
        raise SurgeryError(
            f"adapter {adapter_name!r} has no PEMA in its config: add it with "
            f'model.add_adapter("{adapter_name}", config=ConfigUnion(PEMAConfig(), ...))'
        )
    return _upstream.pema_layer(model).adapters[adapter_name]  # type: ignore[no-any-return]


def _grows(model: Any, adapter_name: str | None, vocabulary: Any) -> bool:
    """Whether training is to add rows. Raises: VocabularyError where there is neither that nor a vocabulary."""
    if adapter_name is None:
        grows, how = _is_grow(vocabulary), 'shrink_embeddings(model, None, "grow")'
    else:
        grows, how = model.adapters_config.match(adapter_name, PEMAConfig).vocabulary == GROW, GROWING_CONFIG
    is_empty = isinstance(vocabulary, PartialVocabulary) and not len(vocabulary)
    if not grows and (vocabulary is None or is_empty or _is_grow(vocabulary)):
        raise VocabularyError(
            f"no vocabulary: give shrink_embeddings a PartialVocabulary or the tokenized training data, or use {how} "
            "to have training add rows as it meets tokens"
        )
    return grows


def _is_grow(vocabulary: Any) -> bool:
    return isinstance(vocabulary, str) and vocabulary == GROW


def _output_policy(model: Any, adapter_name: str | None, policy: str | None) -> str | None:
    """What is to become of a tied head: `policy` in full fine-tuning, else as the adapter's config says."""
    return policy if adapter_name is None else model.adapters_config.match(adapter_name, PEMAConfig).output_embeddings


def _refuse_growing_softmax(model: Any, embedding: nn.Embedding) -> None:
    """Rows of a tied output have gradients at every step, from the first: one that comes later has missed them."""
    if not has_tied_head(model, embedding.owner if isinstance(embedding, PartialEmbedding) else embedding):
        return
    full = "" if model.config.is_encoder_decoder else 'use output_embeddings="full", or '
    raise SurgeryError(
        f"the output of {type(model).__name__} is tied to the input embedding, so rows that come in training would "
        f"have missed the gradients of the output up to then: {full}give shrink_embeddings all of the data before"
    )


def _untied(model: Any, heads: Iterable[str]) -> str:
    """Input and output are two matrices from now on, and the config says so. Returns the name of the output matrix."""
    if model.config.is_encoder_decoder:
        raise SurgeryError(
            f"{type(model).__name__} ties the embeddings of its encoder and decoder along with its output, so "
            'output_embeddings="full" would change what it computes once it is saved: use "tied"'
        )
    head = next(iter(heads))
    logger.warning(
        "%s keeps the base's matrix and is no longer tied to the input embedding, whose rows train alone: "
        "config.tie_word_embeddings is now False", head,
    )  # fmt: skip
    model.config.tie_word_embeddings = False
    return f"{head}.weight"


def _base_of(model: Any, embedding: nn.Embedding) -> Base:
    if isinstance(embedding, PartialEmbedding) and isinstance(embedding.owner.base, Base):
        return embedding.owner.base
    name = next(iter(sites(model.base_model, embedding)))
    return find_base(model, embedding.weight, f"{name}.weight")


def _already_in(target: RowTable, owner: PartialEmbedding, base: Base, vocab_size: int) -> PartialVocabulary:
    """Ids that need a row of their own whatever the data say: rows there are, and rows that no checkpoint has."""
    tables = [table.token_ids for table in (target, owner) if table.token_ids is not None]
    added = torch.arange(base.matrix.file_rows, vocab_size)
    return PartialVocabulary(torch.cat([*(ids.cpu() for ids in tables), added]).numpy(), vocab_size)


def _current_rows(target: RowTable, owner: PartialEmbedding, token_ids: Tensor) -> Tensor:
    """The rows [K, d] of `token_ids` as the target has them, else as the embedding has."""
    rows = owner.rows(token_ids)
    if target is not owner and target.token_ids is not None and len(target.token_ids):
        places = torch.searchsorted(token_ids.to(rows.device), target.token_ids.long())
        rows[places] = target.weight.detach()
    return rows


def _drop_untrained(owner: PartialEmbedding, base: Base) -> None:
    """Own rows (of `load_model`) that are still the base's need no place in memory once an adapter has them."""
    if owner.token_ids is None:
        return
    ids = owner.token_ids.cpu().long()
    if torch.equal(base.rows(ids).to(owner.weight.dtype), owner.weight.detach().cpu()):
        owner.token_ids = owner.fingerprint = None
        owner.shrink(base)


def _active_name(layer: Any) -> str | None:
    rows = None if layer is None else layer.active_rows()
    return next((name for name, table in layer.adapters.items() if table is rows), None) if rows is not None else None


def _refuse_other_rows(layer: Any, active: str | None) -> None:
    others = [name for name in layer.with_rows() if name != active] if layer is not None and active else []
    if others:
        raise SurgeryError(
            f"writing the rows of {active!r} into the matrix would change what lies under the rows of "
            f"{', '.join(others)}: save and delete those adapters first, or deactivate {active!r}"
        )


def _drop_pema_part(model: Any, name: str) -> None:
    config = model.adapters_config.get(name)
    rest = [part for part in getattr(config, "configs", ()) if not isinstance(part, PEMAConfig)]
    if not rest:
        model.delete_adapter(name)
        return
    _upstream.pema_layer(model).delete_adapter(name)
    _upstream.replace_adapter_config(model, name, rest[0] if len(rest) == 1 else ConfigUnion(*rest))


def _detach(model: Any, owner: PartialEmbedding) -> None:
    """Leave no trace: plain embeddings, and no layer."""
    if _upstream.pema_layer(model) is not None:
        _upstream.remove_child(model.base_model)
    revert_heads(model, owner)
    for part in parts_of(model, owner).values():
        revert(part)
