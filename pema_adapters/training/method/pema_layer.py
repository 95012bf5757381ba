"""PEMA as adapters sees it: a child of the base model with the rows that each adapter trains."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from adapters.methods.adapter_layer_base import AdapterLayerBase
from torch import Tensor, nn

from pema_adapters.errors import SurgeryError
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.training import upstream
from pema_adapters.training.base.base_model import with_row_digest
from pema_adapters.training.base.model_vocabulary import get_input_embedding
from pema_adapters.training.embedding.conversion import convert_all
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.embedding.partial_rows import PartialRows
from pema_adapters.training.method.config import PEMAConfig
from pema_adapters.training.method.merged_rows import MergedRows

logger = logging.getLogger(__name__)


class PEMALayer(AdapterLayerBase, nn.Module):  # type: ignore[misc]
    """The rows of every adapter with PEMA.

    Attributes:
        adapters: `PartialRows` by adapter name; adapters saves, loads, deletes, averages and freezes them.
        merged: the state before `merge_adapter`, while an adapter's rows are merged into the matrix; None otherwise.
    """

    adapter_modules_name = "adapters"
    location_key = upstream.METHOD

    def __init__(self, adapters_config: Any, embedding: PartialEmbedding) -> None:
        super().__init__()
        self.adapters_config = adapters_config
        self.adapters = nn.ModuleDict()
        self._embedding = (embedding,)  # a tuple: the embedding is no submodule of this layer
        self.merged: MergedRows | None = None

    @property
    def embedding(self) -> PartialEmbedding:
        """The embedding whose rows these override."""
        return self._embedding[0]

    def get_rows(self, adapter_name: str) -> PartialRows:
        """Return the rows of one adapter."""
        return cast(PartialRows, self.adapters[adapter_name])

    def adapters_with_rows(self) -> list[str]:
        """Return the names of the adapters that have rows."""
        return [name for name in self.adapters if len(self.get_rows(name))]

    def add_adapter(self, adapter_name: str, layer_idx: int) -> bool:
        """Add an adapter, without rows, if its config has PEMA. Returns whether it has."""
        config = self.adapters_config.match(adapter_name, PEMAConfig)
        if config is None:
            return False
        weight = self.embedding.weight
        dtype = weight.dtype if config.dtype is None else getattr(torch, config.dtype)
        size = self.embedding.num_embeddings, weight.shape[1]
        kind = config.unseen, config.trainable, config.vocabulary == "grow"
        rows = PartialRows(*size, weight.device, dtype, *kind)
        rows.tied_to_output = config.trainable and config.output_embeddings != "full"
        rows.train(self.training)
        self.adapters[adapter_name] = rows
        return True

    def get_active_rows(self) -> PartialRows | None:
        """Return the rows of the active adapter, None if no active adapter has PEMA or its rows are merged.

        Raises:
            SurgeryError: several active adapters have rows, the one to train has no vocabulary, or another adapter is
                merged.
        """
        setup = self.get_active_setup()  # type: ignore[operator]
        if setup is None:
            return None
        names = self.require_single(setup.flatten())
        if not names:
            return None
        rows = self.get_rows(names[0])
        if self.merged is not None:
            self._check_merged(names[0], rows)
            return None
        if self.training and rows.trainable and not self._is_ready(rows, rows.weight.requires_grad):
            raise SurgeryError(no_vocabulary_message(names[0], rows.grows))
        if rows.was_loaded:
            self._warn_of_other_base(names[0], rows)
        return rows

    def _check_merged(self, active: str, rows: PartialRows) -> None:
        """Raise SurgeryError if the active adapter is not the merged one, or is about to train."""
        assert self.merged is not None
        if active != self.merged.adapter_name:
            self.refuse_while_merged(f"computing with adapter {active!r}, which has rows of its own")
        if self.training and rows.weight.requires_grad and torch.is_grad_enabled():
            self.refuse_while_merged("training")

    def refuse_while_merged(self, what: str) -> None:
        """Refuse an operation while the rows of an adapter are merged into the matrix.

        Args:
            what: the operation, for the message.

        Raises:
            SurgeryError: an adapter is merged.
        """
        if self.merged is not None:
            raise SurgeryError(
                f"{what}: merge_adapter has written the rows of {self.merged.adapter_name!r} into the embedding: call "
                "model.reset_adapter() first"
            )

    def _is_ready(self, rows: PartialRows, train: bool) -> bool:
        """Return whether rows can be used: there are some, or they are to grow and have a base to grow from."""
        if rows.grows and train:
            return rows.growth_source is not None and self.embedding.is_shrunk
        return len(rows) > 0

    def require_single(self, adapter_names: Iterable[str]) -> list[str]:
        """Return the one adapter of these that has rows, if any, as a list of at most one name.

        Raises:
            SurgeryError: several have rows.
        """
        names = sorted(name for name in set(adapter_names) if name in self.adapters)
        if len(names) > 1:
            raise SurgeryError(
                f"adapters {', '.join(names)} are active together and each has embedding rows of its own: "
                "activate one of them, or average them with average_adapter"
            )
        return names

    def refuse_unscanned(self, adapter_name: str) -> None:
        """Refuse to save an adapter that has PEMA but no vocabulary, since it could not be used.

        Raises:
            SurgeryError: shows the call that gives it one.
        """
        rows = self.get_rows(adapter_name) if adapter_name in self.adapters else None
        if rows is not None and rows.trainable and not len(rows) and not len(rows.fingerprint):
            raise SurgeryError(no_vocabulary_message(adapter_name, rows.grows))

    def reject_parallel(self, kind: str, adapter_names: list[str]) -> None:
        """Refuse an adapter with rows in a block where each adapter sees a part of the batch.

        Args:
            kind: of the block, "Parallel", say.
            adapter_names: all adapters in it.

        Raises:
            SurgeryError: one of them has rows.
        """
        owner = next(iter(self.require_single(adapter_names)), None)
        if owner is not None:
            others = ", ".join(name for name in adapter_names if name != owner)
            raise SurgeryError(
                f"{kind}: adapter {owner!r} has embedding rows, which {others} would use as well, because one "
                f"embedding serves the whole batch: activate {owner!r} by itself or in a Stack"
            )

    def _warn_of_other_base(self, adapter_name: str, rows: PartialRows) -> None:
        """Warn, once, of loaded rows trained on another base; float32 only, where rows are comparable."""
        rows.was_loaded = False
        if not len(rows) or rows.weight.dtype != torch.float32 or not len(rows.fingerprint):
            return
        fingerprint = Fingerprint.from_array(rows.fingerprint.cpu().numpy())
        here = Fingerprint.from_array(with_row_digest(fingerprint, rows.token_ids, self.embedding.read_rows).numpy())
        if here.rows != fingerprint.rows:
            logger.warning(
                "adapter %r was trained on another base: the embedding rows of its %d tokens are not this model's, "
                "so it will not compute what it was trained to", adapter_name, len(rows),
            )  # fmt: skip

    def enable_adapters(self, adapter_setup: Any, unfreeze_adapters: bool, unfreeze_fusion: bool) -> None:
        """Unfreeze the rows of the adapters to train, but for those with `trainable=False`.

        Raises:
            SurgeryError: one of them has no vocabulary.
        """
        for name in sorted(adapter_setup.flatten()):
            rows = self.get_rows(name) if unfreeze_adapters and name in self.adapters else None
            if rows is not None and rows.trainable and not self._is_ready(rows, True):
                raise SurgeryError(no_vocabulary_message(name, rows.grows))
        super().enable_adapters(adapter_setup, unfreeze_adapters, unfreeze_fusion)
        for name in self.adapters:
            if not self.get_rows(name).trainable:
                self.get_rows(name).weight.requires_grad_(False)

    def average_adapter(
        self, adapter_name: str, input_adapters: dict[str, float], combine_strategy: str, **kwargs: Any
    ) -> bool:
        """Add an adapter with the weighted sum of others, over the union of their vocabularies.

        Where an adapter has no row, its base row counts. If none of them has a vocabulary, the sum has none either.

        Args:
            adapter_name: the new adapter.
            input_adapters: the weights by adapter name.
            combine_strategy: "linear".
            kwargs: ignored.

        Returns:
            Whether the new adapter's config has PEMA.

        Raises:
            ValueError: another strategy.
            SurgeryError: rows are merged into the matrix.
        """
        if not self.add_adapter(adapter_name, -1):
            return False
        self.refuse_while_merged("average_adapter")
        if combine_strategy != "linear":
            raise ValueError(f'combine_strategy {combine_strategy!r} cannot average PEMA rows, expected "linear"')
        tables = [(self.get_rows(name), share) for name, share in input_adapters.items()]
        token_ids = torch.unique(torch.cat([rows.token_ids for rows, _ in tables]))
        average = self._sum_rows(token_ids, tables)
        known = next((rows for rows, _ in tables if len(rows.fingerprint)), None)
        if known is None:
            return True
        fingerprint = Fingerprint.from_array(known.fingerprint.cpu().numpy())
        mean = self.get_rows(adapter_name)
        mean.set_rows(token_ids, average, with_row_digest(fingerprint, token_ids, self.embedding.read_rows))
        mean.growth_source = known.growth_source if mean.grows else None
        return True

    def _sum_rows(self, token_ids: Tensor, tables: list[tuple[PartialRows, float]]) -> Tensor:
        """Return the weighted sum [n, d] of the rows of `token_ids` [n]."""
        base_rows = self.embedding.read_rows(token_ids)
        total = torch.zeros_like(base_rows)
        for rows, share in tables:
            own = base_rows.clone()
            own[torch.searchsorted(token_ids, rows.token_ids)] = rows.weight.detach()
            total += share * own
        return total


def attach_pema_layer(base_model: Any) -> PEMALayer:
    """Return the `PEMALayer` of `base_model`, after adding it with the first adapter that has PEMA.

    Raises:
        SurgeryError: the model has no token embedding.
    """
    layer = upstream.pema_layer(base_model)
    if layer is not None:
        return layer  # type: ignore[no-any-return]
    owner = convert_all(base_model, get_input_embedding(base_model))
    layer = PEMALayer(base_model.adapters_config, owner)
    layer.train(base_model.training)
    owner.set_row_provider(layer)
    upstream.add_child(base_model, layer)
    return layer


def no_vocabulary_message(adapter_name: str, grows: bool) -> str:
    """Return the message for an adapter that is to train without a vocabulary; it shows the call to make."""
    call = f'call pema_adapters.shrink_embeddings(model, "{adapter_name}"'
    if grows:
        return f"adapter {adapter_name!r} has PEMA but no vocabulary yet that could grow: {call}) first"
    return (
        f"adapter {adapter_name!r} has PEMA but no vocabulary yet: {call}, dataset) with the tokenized training data "
        'first, or use PEMAConfig(vocabulary="grow")'
    )
