"""PEMA as adapters sees it: a child of the base model that holds, for each adapter, the rows it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from adapters.methods.adapter_layer_base import AdapterLayerBase
from torch import Tensor, nn

from pema_adapters.errors import SurgeryError
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.training.base.find_base import refit
from pema_adapters.training.base.model_vocabulary import input_embedding
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding, convert_all
from pema_adapters.training.embedding.row_table import PartialRows
from pema_adapters.training.method.config import PEMAConfig
from pema_adapters.training.method.merged_rows import MergedRows
from pema_adapters.training.upstream import private_names as _upstream

logger = logging.getLogger(__name__)


class PEMALayer(AdapterLayerBase, nn.Module):  # type: ignore[misc]
    """The rows of every adapter with PEMA.

    adapters saves, loads, deletes, averages and freezes what is in `adapters`.
    """

    adapter_modules_name = "adapters"
    location_key = _upstream.METHOD

    def __init__(self, adapters_config: Any, embedding: PartialEmbedding) -> None:
        super().__init__()
        self.adapters_config = adapters_config
        self.adapters = nn.ModuleDict()
        self._embedding = (embedding,)  # in a tuple: the embedding is no submodule of this layer
        self.merged: MergedRows | None = None
        """What `merge_adapter` has written into the matrix."""

    @property
    def embedding(self) -> PartialEmbedding:
        """The embedding that the rows lie over."""
        return self._embedding[0]

    def rows_of(self, adapter_name: str) -> PartialRows:
        """The rows of one adapter."""
        return cast(PartialRows, self.adapters[adapter_name])

    def with_rows(self) -> list[str]:
        """The names of the adapters that have a vocabulary."""
        return [name for name in self.adapters if len(self.rows_of(name))]

    def add_adapter(self, adapter_name: str, layer_idx: int) -> bool:
        """Make room for an adapter, if its config has PEMA; it has no rows yet. Returns whether it has."""
        config = self.adapters_config.match(adapter_name, PEMAConfig)
        if config is None:
            return False
        weight = self.embedding.weight
        dtype = weight.dtype if config.dtype is None else getattr(torch, config.dtype)
        size = self.embedding.num_embeddings, weight.shape[1]
        kind = config.unseen, config.trainable, config.vocabulary == "grow"
        rows = PartialRows(*size, weight.device, dtype, *kind)
        rows.ties_output = config.trainable and config.output_embeddings != "full"
        rows.train(self.training)
        self.adapters[adapter_name] = rows
        return True

    def active_rows(self) -> PartialRows | None:
        """The rows of the active adapter, None where no active adapter has PEMA.

        Raises: SurgeryError if several have.
        """
        setup = self.get_active_setup()  # type: ignore[operator]
        if setup is None:
            return None
        names = self.only_one(setup.flatten())
        if not names:
            return None
        rows = self.rows_of(names[0])
        if self.merged is not None:
            self._check_merged(names[0], rows)
            return None
        if self.training and rows.trainable and not self._is_ready(rows, rows.weight.requires_grad):
            raise SurgeryError(no_vocabulary(names[0], rows.grows))
        if rows.was_loaded:
            self._compare_base(names[0], rows)
        return rows

    def _check_merged(self, active: str, rows: PartialRows) -> None:
        """Raise SurgeryError where the matrix, with rows merged into it, would not do as that of the active adapter."""
        assert self.merged is not None
        if active != self.merged.adapter_name:
            self.refuse_while_merged(f"computing with adapter {active!r}, which has rows of its own")
        if self.training and rows.weight.requires_grad and torch.is_grad_enabled():
            self.refuse_while_merged("training")

    def refuse_while_merged(self, what: str) -> None:
        """Raise SurgeryError while the rows of an adapter are merged into the matrix."""
        if self.merged is not None:
            raise SurgeryError(
                f"{what}: merge_adapter has written the rows of {self.merged.adapter_name!r} into the embedding: call "
                "model.reset_adapter() first"
            )

    def _is_ready(self, rows: PartialRows, train: bool) -> bool:
        """Whether there are rows; of some that grow while they train, whether there is a base to read more from."""
        if rows.grows and train:
            return rows.grows_over is not None and self.embedding.is_shrunk
        return len(rows) > 0

    def only_one(self, adapter_names: Iterable[str]) -> list[str]:
        """Those of the adapters that have rows, one or none. Raises: SurgeryError if several have."""
        names = sorted(name for name in set(adapter_names) if name in self.adapters)
        if len(names) > 1:
            raise SurgeryError(
                f"adapters {', '.join(names)} are active together and each has embedding rows of its own: "
                "activate one of them, or average them with average_adapter"
            )
        return names

    def refuse_unscanned(self, adapter_name: str) -> None:
        """Raise SurgeryError where an adapter is to be saved that has PEMA, but no vocabulary: nothing could use it."""
        rows = self.rows_of(adapter_name) if adapter_name in self.adapters else None
        if rows is not None and rows.trainable and not len(rows) and not len(rows.fingerprint):
            raise SurgeryError(no_vocabulary(adapter_name, rows.grows))

    def refuse_branch(self, kind: str, adapter_names: list[str]) -> None:
        """Raise SurgeryError where an adapter with rows is one of several that share the inputs of one batch."""
        owner = next(iter(self.only_one(adapter_names)), None)
        if owner is not None:
            others = ", ".join(name for name in adapter_names if name != owner)
            raise SurgeryError(
                f"{kind}: adapter {owner!r} has embedding rows, which {others} would get as well, for all of a batch "
                f"goes through one embedding: activate {owner!r} by itself or in a Stack"
            )

    def _compare_base(self, adapter_name: str, rows: PartialRows) -> None:
        """Say so, once, where loaded rows were trained on another base; in half precision that cannot be told."""
        rows.was_loaded = False
        if not len(rows) or rows.weight.dtype != torch.float32 or not len(rows.fingerprint):
            return
        fingerprint = Fingerprint.from_array(rows.fingerprint.cpu().numpy())
        here = Fingerprint.from_array(refit(fingerprint, rows.token_ids, self.embedding.rows).numpy())
        if here.rows != fingerprint.rows:
            logger.warning(
                "adapter %r was trained on another base: the embedding rows of its %d tokens are not this model's, "
                "so it will not compute what it was trained to", adapter_name, len(rows),
            )  # fmt: skip

    def enable_adapters(self, adapter_setup: Any, unfreeze_adapters: bool, unfreeze_fusion: bool) -> None:
        """Unfreeze the rows of the adapters to train. Raises: SurgeryError where one has no vocabulary yet."""
        for name in sorted(adapter_setup.flatten()):
            rows = self.rows_of(name) if unfreeze_adapters and name in self.adapters else None
            if rows is not None and rows.trainable and not self._is_ready(rows, True):
                raise SurgeryError(no_vocabulary(name, rows.grows))
        super().enable_adapters(adapter_setup, unfreeze_adapters, unfreeze_fusion)
        for name in self.adapters:
            if not self.rows_of(name).trainable:
                self.rows_of(name).weight.requires_grad_(False)

    def average_adapter(
        self, adapter_name: str, input_adapters: dict[str, float], combine_strategy: str, **kwargs: Any
    ) -> bool:
        """Add the weighted sum of adapters over the union of their vocabularies; missing rows are base rows.

        Adapters without a vocabulary have none but base rows; the sum of these alone has no vocabulary either.
        """
        if not self.add_adapter(adapter_name, -1):
            return False
        self.refuse_while_merged("average_adapter")
        if combine_strategy != "linear":
            raise ValueError(f'combine_strategy {combine_strategy!r} cannot average PEMA rows, expected "linear"')
        tables = [(self.rows_of(name), share) for name, share in input_adapters.items()]
        token_ids = torch.unique(torch.cat([rows.token_ids for rows, _ in tables]))
        base_rows = self.embedding.rows(token_ids)
        average = torch.zeros_like(base_rows)
        for rows, share in tables:
            average += share * _rows_over(base_rows, token_ids, rows)
        known = next((rows for rows, _ in tables if len(rows.fingerprint)), None)
        if known is None:
            return True
        fingerprint = Fingerprint.from_array(known.fingerprint.cpu().numpy())
        mean = self.rows_of(adapter_name)
        mean.set_rows(token_ids, average, refit(fingerprint, token_ids, self.embedding.rows))
        mean.grows_over = known.grows_over if mean.grows else None
        return True


def attach(base_model: Any) -> PEMALayer:
    """The `PEMALayer` of `base_model`, made at the first adapter with PEMA.

    Raises: SurgeryError where it has no token embedding.
    """
    layer = _upstream.pema_layer(base_model)
    if layer is not None:
        return layer  # type: ignore[no-any-return]
    owner = convert_all(base_model, input_embedding(base_model))
    layer = PEMALayer(base_model.adapters_config, owner)
    layer.train(base_model.training)
    owner.set_overlay(layer)
    _upstream.add_child(base_model, layer)
    return layer


def no_vocabulary(adapter_name: str, grows: bool) -> str:
    """The message for an adapter that is to train without a vocabulary: it shows the call to make."""
    call = f'call pema_adapters.shrink_embeddings(model, "{adapter_name}"'
    if grows:
        return f"adapter {adapter_name!r} has PEMA but no vocabulary yet that could grow: {call}) first"
    return (
        f"adapter {adapter_name!r} has PEMA but no vocabulary yet: {call}, dataset) with the tokenized training data "
        'first, or use PEMAConfig(vocabulary="grow")'
    )


def _rows_over(base_rows: Tensor, token_ids: Tensor, rows: PartialRows) -> Tensor:
    """`base_rows` [n, d] of `token_ids` [n] with the rows of an adapter in their places."""
    merged = base_rows.clone()
    merged[torch.searchsorted(token_ids, rows.token_ids)] = rows.weight.detach()
    return merged
