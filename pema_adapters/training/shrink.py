"""Replace the full embedding by the partial one, and restore it (the paper's section 4, before and after training)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from adapters import ConfigUnion
from torch import Tensor, nn

from pema_adapters.errors import SurgeryError, VocabularyError
from pema_adapters.training import upstream
from pema_adapters.training.base.base_model import BaseModel
from pema_adapters.training.base.find_base import find_base
from pema_adapters.training.base.model_vocabulary import complete_vocabulary, get_input_embedding
from pema_adapters.training.embedding.conversion import convert_all, find_aliases, find_embeddings, revert
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.embedding.partial_rows import PartialRows
from pema_adapters.training.embedding.row_table import RowTable
from pema_adapters.training.method.config import PEMAConfig
from pema_adapters.training.output.full_matrix import load_full_matrix
from pema_adapters.training.output.tied_head import PartialOutput, convert_heads, has_tied_head, revert_heads
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
    output_storage: Literal["auto", "disk", "host", "device"] = "auto",
) -> PartialVocabulary:
    """Keep only the rows of `vocabulary` in memory, as the trainable rows [K, d] of adapter `adapter_name`.

    The model computes the same function as before, and still takes original token ids. The full matrix [V, d] is
    released: other rows are read from the checkpoint on disk when they are needed. Rows that the adapter has already
    keep their trained values and optimizer state, so a second stage of training can use a larger vocabulary.

    Args:
        model: a Transformers model with adapters (`adapters.init` or AutoAdapterModel); changed in place.
        adapter_name: an adapter with a `PEMAConfig`; None for full fine-tuning without adapters.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one (see `PartialVocabulary.from_dataset`).
            Optional with `PEMAConfig(vocabulary="grow")`: training adds the tokens that it meets. "grow" means the
            same in full fine-tuning.
        output_embeddings: as in `PEMAConfig`, for full fine-tuning of a language model.
        output_storage: likewise.

    Returns:
        The vocabulary in use. It also contains the ids that the model inserts itself (pad, bos, eos, decoder start),
        and rows that `resize_token_embeddings` added. A growing vocabulary is returned as it is now.

    Raises:
        SurgeryError: no such adapter, an adapter without PEMA, a model without a token embedding, an embedding that
            the output shares in an unsupported way, or a growing vocabulary with a tied head.
        VocabularyError: a vocabulary of another size than the model's V, or data that cannot be scanned.
    """
    embedding = get_input_embedding(model)
    layer = upstream.pema_layer(model)
    if layer is not None:
        layer.refuse_while_merged("shrink_embeddings")
    adapter_rows = None if adapter_name is None else _get_adapter_rows(model, adapter_name)
    grows = _decide_growth(model, adapter_name, vocabulary)
    output = _get_output_options(model, adapter_name, OutputOptions(output_embeddings, output_storage))
    if grows and output.is_tied:
        _refuse_growing_output(model, embedding)
    used = _complete_vocabulary(model, embedding.num_embeddings, vocabulary)
    base = _get_base(model, embedding)
    owner = convert_all(model, embedding)
    table: RowTable = owner if adapter_rows is None else adapter_rows
    if adapter_rows is None:
        owner.tied_to_output = output.is_tied
    heads, untied = _prepare_heads(model, owner, output)
    used = used | _find_required_ids(table, owner, base, used.vocab_size)
    token_ids = torch.from_numpy(used.token_ids.copy())
    rows = _read_current_rows(table, owner, token_ids)
    is_adapter = adapter_rows is not None
    fingerprint = base.make_fingerprint(token_ids, include_newly_initialized=is_adapter, untied=untied)
    _release_matrix(owner, heads, base)
    table.set_rows(token_ids, rows, fingerprint)
    table.growth_source = base if grows else None
    if is_adapter:
        _drop_untrained(owner, base)
    return used


@dataclass(frozen=True)
class OutputOptions:
    """The options of `PEMAConfig` for a head that is tied to the input embedding."""

    embeddings: str | None
    storage: str

    @property
    def is_tied(self) -> bool:
        """Whether the head uses the trained rows as well."""
        return self.embeddings != "full"


def restore_embeddings(model: Any) -> None:
    """Restore the full embedding [V, d], with the active adapter's rows written in.

    The adapter loses its PEMA part; one with PEMA alone is deleted. With no PEMA adapter active, the matrix is the
    base's and the adapters keep their rows. After full fine-tuning the trained rows are written in. A model that was
    never shrunk is left alone.

    Args:
        model: changed in place.

    Raises:
        SurgeryError: other adapters have rows, which were trained on the base and not on the restored matrix; or
            `merge_adapter` has merged rows.
    """
    embedding = get_input_embedding(model)
    if not isinstance(embedding, PartialEmbedding):
        return
    owner, layer = embedding.owner, upstream.pema_layer(model)
    if layer is not None:
        layer.refuse_while_merged("restore_embeddings")
    name = _find_active_adapter(layer)
    _refuse_other_rows(layer, name)
    load_full_matrix(model, owner, None if name is None else layer.get_rows(name))
    if name is not None:
        _drop_pema_part(model, name)
    if layer is None or not len(layer.adapters):
        _remove_all(model, owner)


def _get_adapter_rows(model: Any, adapter_name: str) -> PartialRows:
    if not upstream.has_adapters_support(model):
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
    return upstream.pema_layer(model).adapters[adapter_name]  # type: ignore[no-any-return]


def _decide_growth(model: Any, adapter_name: str | None, vocabulary: Any) -> bool:
    """Return whether training adds rows. Raises: VocabularyError if it does not and there is no vocabulary."""
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


def _refuse_growing_output(model: Any, embedding: nn.Embedding) -> None:
    """Refuse rows added later in a tied output: every row of an output has a gradient from the first step on."""
    if not has_tied_head(model, embedding.owner if isinstance(embedding, PartialEmbedding) else embedding):
        return
    full = "" if model.config.is_encoder_decoder else 'use output_embeddings="full", or '
    raise SurgeryError(
        f"the output of {type(model).__name__} is tied to the input embedding, so rows added during training would "
        f"have missed the gradients of the output before: {full}give shrink_embeddings all of the data beforehand"
    )


def _get_output_options(model: Any, adapter_name: str | None, given: OutputOptions) -> OutputOptions:
    """Return the options given for full fine-tuning, else those of the adapter's config."""
    if adapter_name is None:
        return given
    config = model.adapters_config.match(adapter_name, PEMAConfig)
    return OutputOptions(config.output_embeddings, config.output_storage)


def _prepare_heads(model: Any, owner: PartialEmbedding, options: OutputOptions) -> tuple[list[PartialOutput], str]:
    """Convert the heads that share the matrix. Returns them, and the name of the output matrix if it is untied now."""
    heads = convert_heads(model, owner)
    for head in heads.values():
        head.set_storage(options.storage)
    return list(heads.values()), _untie(model, heads) if heads and not options.is_tied else ""


def _complete_vocabulary(model: Any, vocab_size: int, vocabulary: Any) -> PartialVocabulary:
    if vocabulary is None or _is_grow(vocabulary):
        vocabulary = PartialVocabulary([], vocab_size)
    return complete_vocabulary(model, vocab_size, vocabulary)


def _release_matrix(owner: PartialEmbedding, heads: Iterable[PartialOutput], base: BaseModel) -> None:
    """Shrink the embedding, and the heads that share its matrix, unless it is shrunk already."""
    if not owner.is_shrunk:
        for head in heads:
            head.release()
        owner.shrink(base)


def _untie(model: Any, heads: Iterable[str]) -> str:
    """Record in the config that input and output are two matrices. Returns the name of the output matrix."""
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


def _get_base(model: Any, embedding: nn.Embedding) -> BaseModel:
    if isinstance(embedding, PartialEmbedding) and isinstance(embedding.owner.base, BaseModel):
        return embedding.owner.base
    name = next(iter(find_embeddings(model.base_model, embedding)))
    return find_base(model, embedding.weight, f"{name}.weight")


def _find_required_ids(table: RowTable, owner: PartialEmbedding, base: BaseModel, vocab_size: int) -> PartialVocabulary:
    """Return ids that need a row in any case: those that have one, and rows that the checkpoint lacks."""
    tables = [each.token_ids for each in (table, owner) if each.token_ids is not None]
    added = torch.arange(base.matrix.file_rows, vocab_size)
    return PartialVocabulary(torch.cat([*(ids.cpu() for ids in tables), added]).numpy(), vocab_size)


def _read_current_rows(table: RowTable, owner: PartialEmbedding, token_ids: Tensor) -> Tensor:
    """Return the rows [K, d] of `token_ids` [K]: the table's, else the embedding's."""
    rows = owner.read_rows(token_ids)
    if table is not owner and table.token_ids is not None and len(table.token_ids):
        positions = torch.searchsorted(token_ids.to(rows.device), table.token_ids.long())
        rows[positions] = table.weight.detach()
    return rows


def _drop_untrained(owner: PartialEmbedding, base: BaseModel) -> None:
    """Drop own rows (of `load_model`) that still equal the base's, once an adapter has rows."""
    if owner.token_ids is None:
        return
    ids = owner.token_ids.cpu().long()
    if torch.equal(base.read_rows(ids).to(owner.weight.dtype), owner.weight.detach().cpu()):
        owner.token_ids = owner.fingerprint = None
        owner.shrink(base)


def _find_active_adapter(layer: Any) -> str | None:
    rows = None if layer is None else layer.get_active_rows()
    return next((name for name, table in layer.adapters.items() if table is rows), None) if rows is not None else None


def _refuse_other_rows(layer: Any, active: str | None) -> None:
    others = [name for name in layer.adapters_with_rows() if name != active] if layer is not None and active else []
    if others:
        raise SurgeryError(
            f"writing the rows of {active!r} into the matrix would change the base under the rows of "
            f"{', '.join(others)}: save and delete those adapters first, or deactivate {active!r}"
        )


def _drop_pema_part(model: Any, name: str) -> None:
    config = model.adapters_config.get(name)
    rest = [part for part in getattr(config, "configs", ()) if not isinstance(part, PEMAConfig)]
    if not rest:
        model.delete_adapter(name)
        return
    upstream.pema_layer(model).delete_adapter(name)
    upstream.replace_adapter_config(model, name, rest[0] if len(rest) == 1 else ConfigUnion(*rest))


def _remove_all(model: Any, owner: PartialEmbedding) -> None:
    """Remove the layer and revert all heads and embeddings to their own classes."""
    if upstream.pema_layer(model) is not None:
        upstream.remove_child(model.base_model)
    revert_heads(model, owner)
    for alias in find_aliases(model, owner).values():
        revert(alias)
