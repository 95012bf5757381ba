"""The partial embedding E' [K, d] (the paper's section 4) as a module. It depends on torch, not on adapters.

`convert` turns an `nn.Embedding` into a `PartialEmbedding` in place, so that every reference to the module stays valid.
Its `weight` stays the same Parameter throughout; only the data behind it change:

    full          weight [V, d]                       as Transformers created it
    own rows      weight [K, d] and token_ids [K]     full fine-tuning with PEMA
    shrunk        weight [0, d]                       the rows are elsewhere: in an adapter, or on disk

A token is looked up in the active adapter's rows first, if there are any, then in the own rows, then in the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pema_adapters.errors import UnseenTokenError
from pema_adapters.training.embedding import optimizer_state
from pema_adapters.training.embedding.dynamic_rows import GROWTH_LOCK, is_growing, record_thread, refuse_replicas
from pema_adapters.training.embedding.partial_rows import PartialRows
from pema_adapters.training.embedding.row_index import replace_data
from pema_adapters.training.embedding.row_table import RowSource, RowTable, check_range, refuse_data_parallel
from pema_adapters.training.embedding.unseen_monitor import UnseenCounter, UnseenMonitor

Lookup = Callable[[Tensor], Tensor]
"""Rows [..., d] of token ids [...]."""


class RowProvider(Protocol):
    """Provides rows that take precedence over an embedding's own: the `PEMALayer`."""

    def get_active_rows(self) -> PartialRows | None:
        """Return the rows of the active adapter, or None."""


class PartialEmbedding(RowTable, nn.Embedding):
    """An `nn.Embedding` [V, d] with only some rows in memory. Made by `convert`, never constructed.

    It takes original token ids; `num_embeddings` and `padding_idx` refer to the full vocabulary.

    Attributes:
        base: where the other rows are read from; None while the full matrix is in memory.
    """

    base: RowSource | None
    _monitor: UnseenMonitor
    _counter: UnseenCounter
    _owner: tuple[PartialEmbedding, ...]
    _row_provider: tuple[RowProvider, ...]

    @property
    def is_shrunk(self) -> bool:
        """Whether the full matrix is on disk rather than in memory."""
        return self.base is not None

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """V, the number of rows of the full matrix."""
        return self.num_embeddings

    @property
    def owner(self) -> PartialEmbedding:
        """The embedding that does the lookup for all that share its weight (encoder and decoder, say)."""
        return self._owner[0] if self._owner else self

    def set_row_provider(self, provider: RowProvider | None) -> None:
        """Look tokens up in `provider.get_active_rows()` first."""
        self._row_provider = () if provider is None else (provider,)  # a tuple: it is no submodule of the embedding

    def shrink(self, base: RowSource) -> None:
        """Release the matrix: rows come from the provider or from `base`, unless `set_rows` gives it own ones."""
        self._release()
        self.base = base
        replace_data(self.weight, self.weight.data.new_empty(0, self.embedding_dim))

    def restore(self, matrix: Annotated[Tensor, "Float V d"]) -> None:
        """Hold `matrix` [V, d] again, in the dtype and on the device of the weight."""
        self._release()
        self.base = None
        replace_data(self.weight, matrix.to(self.weight.device, self.weight.dtype))

    def _release(self) -> None:
        """Drop the own rows and stop growing."""
        self.token_ids = self.fingerprint = self._row_index = self.growth_source = None
        self._fingerprint_is_stale = False
        self._invalidate_index()
        optimizer_state.untrack(self)

    def read_rows(self, token_ids: Annotated[Tensor, "Int n"]) -> Annotated[Tensor, "Float n d"]:
        """Return the rows [n, d] of `token_ids` [n] without the active adapter's, detached."""
        with torch.no_grad():
            return self._embed_own(token_ids.to(self.weight.device))

    def iterate_tied_rows(self) -> Iterator[RowTable]:
        """Yield the tables whose rows a tied head must use as well; a later one overrides an earlier one."""
        owner = self.owner
        active = owner._row_provider[0].get_active_rows() if owner._row_provider else None
        for table in (owner, active):
            if table is not None and table.token_ids is not None and len(table.token_ids) and table.tied_to_output:
                yield table

    @contextmanager
    def count_absent_rows(self) -> Iterator[None]:
        """Include the rows that are not in memory in `parameters()`, as a meta tensor, inside the block."""
        absent = torch.empty(self.num_embeddings - len(self.weight), self.embedding_dim, device="meta")
        self.register_parameter("_absent", nn.Parameter(absent, requires_grad=False))
        try:
            yield
        finally:
            del self._parameters["_absent"]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input_ids: Annotated[Tensor, "Int *batch"]) -> Annotated[Tensor, "Float *batch d"]:
        """Return rows [..., d] of `input_ids` [...], as the full matrix with the trained rows written in gives them.

        Raises:
            UnseenTokenError: a token has no row, and the adapter's config says `unseen="error"`.
            TokenRangeError: an id is negative, or V or above.
            SurgeryError: the module is a replica of `nn.DataParallel`.
        """
        refuse_data_parallel(self)
        return self.owner._look_up(input_ids)

    def _look_up(self, input_ids: Tensor) -> Tensor:
        rows = self._row_provider[0].get_active_rows() if self._row_provider else None
        if rows is None or not (len(rows) or is_growing(rows, self.training)):
            return self._embed_own(input_ids)
        return self._embed_adapter(input_ids, rows).to(self.weight.dtype)

    def _embed_adapter(self, input_ids: Tensor, rows: PartialRows) -> Tensor:
        """Embed with an adapter's rows, and with the own ones where it has none."""
        if self.is_shrunk or rows.unseen == "error":
            return self._embed_partial(input_ids, rows, self._embed_own, rows.unseen)
        positions = rows.locate(input_ids)
        self._count_unseen(positions, rows)
        seen = (positions >= 0).unsqueeze(-1)
        return torch.where(seen, self._embed_rows(positions, rows), self._embed_own(input_ids))

    def _embed_own(self, input_ids: Tensor) -> Tensor:
        if not self.is_shrunk:
            return super().forward(input_ids)
        if self.token_ids is None:
            return self._embed_base(input_ids)
        return self._embed_partial(input_ids, self, self._embed_base, "base")

    def _embed_partial(self, input_ids: Tensor, rows: RowTable, fallback: Lookup, unseen: str) -> Tensor:
        """Embed with `rows`, and with `fallback` the tokens without a row; a growing table gets these rows first."""
        if rows.growth_source is None:
            return self._embed_static(input_ids, rows, fallback, unseen)
        with GROWTH_LOCK:
            if not is_growing(rows, self.training):
                return self._embed_static(input_ids, rows, fallback, unseen)
            refuse_replicas(rows)
            record_thread(rows)
            return self._embed_rows(self._locate_or_add(input_ids, rows), rows)

    def _embed_static(self, input_ids: Tensor, rows: RowTable, fallback: Lookup, unseen: str) -> Tensor:
        """Embed without adding rows.

        In training on a GPU, looking for unseen tokens would synchronise at every step. The data were scanned, so all
        tokens are taken to have a row; if one has none, the monitor raises at a later step.
        """
        positions = rows.locate(input_ids)
        if self.training and input_ids.is_cuda and rows.growth_source is None and torch.is_grad_enabled():
            self._monitor.record(input_ids, positions)
            return self._embed_rows(positions, rows)
        if unseen != "error":
            self._count_unseen(positions, rows)
        if not _any_negative(positions):
            return self._embed_rows(positions, rows)
        missing = positions < 0
        if unseen == "error":
            raise UnseenTokenError(_unseen_message(input_ids[missing]))
        found = self._embed_rows(positions, rows)
        return found.masked_scatter(missing.unsqueeze(-1), fallback(input_ids[missing]).to(found.dtype))

    def _count_unseen(self, positions: Tensor, rows: RowTable) -> None:
        """Count tokens without a row where rows train; on the CPU only, since it would synchronise elsewhere."""
        trains = self.training and rows.weight.requires_grad and torch.is_grad_enabled()
        if trains and positions.device.type == "cpu" and not self._counter.has_warned:
            self._counter.add(positions.numel(), int((positions.numpy() < 0).sum()))

    def _locate_or_add(self, input_ids: Tensor, rows: RowTable) -> Tensor:
        """Return the positions [...] of tokens, after adding rows, with their current values, for new ones."""
        positions = rows.locate(input_ids)
        if _any_negative(positions):
            token_ids = torch.unique(input_ids[positions < 0])
            rows.add_rows(token_ids, self.read_rows(token_ids))
            positions = rows.locate(input_ids)
        return positions

    def _embed_rows(self, positions: Tensor, rows: RowTable) -> Tensor:
        """Embed from `rows`; a missing row is replaced by the first. The padding row gets no gradient, as usual."""
        return functional.embedding(
            positions.clamp(min=0),
            rows.get_growable_weight(),
            rows.locate_token(self.padding_idx),
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    def _embed_base(self, input_ids: Tensor) -> Tensor:
        assert self.base is not None
        check_range(input_ids, self.vocab_size)
        unique, inverse = torch.unique(input_ids, return_inverse=True)
        rows = self.base.read_rows(unique.cpu()).to(self.weight.device, self.weight.dtype)
        return rows if torch.equal(unique, input_ids) else functional.embedding(inverse, rows)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._monitor.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        """Describe V, d and what is in memory."""
        where = f"{self.weight.shape[0]:,} rows in memory" if self.is_shrunk else "full"
        return f"{super().extra_repr()}, {where}"


def _any_negative(positions: Tensor) -> bool:
    """Return whether a position is missing; the NumPy view makes the check about free on the CPU."""
    if positions.device.type == "cpu":
        return bool((positions.numpy() < 0).any())
    return bool((positions < 0).any())


def _unseen_message(token_ids: Tensor) -> str:
    unique = torch.unique(token_ids).tolist()
    some = ", ".join(map(str, unique[:5])) + (", ..." if len(unique) > 5 else "")
    return (
        f'{len(unique)} token ids are outside the partial vocabulary ({some}) and PEMAConfig(unseen="error") refuses '
        'them: scan this data too, or use PEMAConfig(unseen="base") to read their rows from the base'
    )
