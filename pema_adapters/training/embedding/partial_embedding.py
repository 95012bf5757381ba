"""The partial embedding E' [K, d] (the paper's section 4) as a module. Torch only: it knows nothing of adapters.

An `nn.Embedding` becomes a `PartialEmbedding` in place, by its class, so that whoever holds the module keeps holding
the right one. Its `weight` stays the same Parameter throughout; only the data behind it change:

    full            weight [V, d]                       as Transformers made it
    own rows        weight [K, d] and token_ids [K]     full fine-tuning with PEMA
    shrunk          weight [0, d]                       the rows are elsewhere: an adapter's, or on disk

A token is looked up in the overlay's rows first (the active adapter's, if any), then in the own rows, then in the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from pema_adapters.errors import UnseenTokenError
from pema_adapters.training.embedding import optimizer_state
from pema_adapters.training.embedding.dynamic_rows import GROWTH, grows_now, note_thread, refuse_replicas
from pema_adapters.training.embedding.row_index import replace_data
from pema_adapters.training.embedding.row_table import (
    PartialRows,
    RowSource,
    RowTable,
    check_range,
    refuse_data_parallel,
)
from pema_adapters.training.embedding.unseen_monitor import UnseenCount, UnseenWatch

Lookup = Callable[[Tensor], Tensor]

_OWN_ATTRIBUTES = (
    "base", "_overlay", "_watch", "_count", "_owner", "_index", "_padding", "_layout", "_fingerprint_is_old",
    "grows_over", "was_loaded", "ties_output", "grown_by",
)  # fmt: skip


class Overlay(Protocol):
    """Who provides rows that lie over an embedding, if any: the adapters-facing layer."""

    def active_rows(self) -> PartialRows | None:
        """The rows of the active adapter, or None."""


class PartialEmbedding(RowTable, nn.Embedding):
    """An `nn.Embedding` [V, d] of which only some rows are in memory. Made by `convert`, never constructed.

    `num_embeddings` and `padding_idx` keep their meaning in the full vocabulary; original token ids go in.
    """

    base: RowSource | None
    _watch: UnseenWatch
    _count: UnseenCount
    _owner: tuple[PartialEmbedding, ...]
    _overlay: tuple[Overlay, ...]

    @property
    def is_shrunk(self) -> bool:
        """Whether the full matrix is on disk rather than in memory."""
        return self.base is not None

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        """V, rows of the full matrix."""
        return self.num_embeddings

    @property
    def owner(self) -> PartialEmbedding:
        """The module that speaks for all that share one weight (encoder and decoder of one model, say)."""
        return self._owner[0] if self._owner else self

    def set_overlay(self, overlay: Overlay | None) -> None:
        """Look in `overlay.active_rows()` first. Held in a tuple: it is no submodule of the embedding."""
        self._overlay = () if overlay is None else (overlay,)

    def shrink(self, base: RowSource) -> None:
        """Let go of the matrix: rows come from the overlay or from `base`. `set_rows` may give own ones."""
        self._let_go()
        self.base = base
        replace_data(self.weight, self.weight.data.new_empty(0, self.embedding_dim))

    def restore(self, matrix: Tensor) -> None:
        """Hold `matrix` [V, d] again, in the dtype and on the device of the weight."""
        self._let_go()
        self.base = None
        replace_data(self.weight, matrix.to(self.weight.device, self.weight.dtype))

    def _let_go(self) -> None:
        """Have no rows, and none that grow."""
        self.token_ids = self.fingerprint = self._layout = self.grows_over = None
        self._fingerprint_is_old = False
        self._forget_index()
        optimizer_state.forget(self)

    def rows(self, token_ids: Tensor) -> Tensor:
        """The rows [n, d] of `token_ids` [n] as they are without an overlay, detached."""
        with torch.no_grad():
            return self._own(token_ids.to(self.weight.device))

    def tied_rows(self) -> Iterator[RowTable]:
        """The tables whose rows a head that shares the matrix is to use as well, later ones over earlier ones."""
        owner = self.owner
        active = owner._overlay[0].active_rows() if owner._overlay else None
        for table in (owner, active):
            if table is not None and table.token_ids is not None and len(table.token_ids) and table.ties_output:
                yield table

    @contextmanager
    def counting_absent_rows(self) -> Iterator[None]:
        """Let `parameters()` include the rows that are not in memory, as a meta tensor, for the time of the block."""
        absent = torch.empty(self.num_embeddings - len(self.weight), self.embedding_dim, device="meta")
        self.register_parameter("_absent", nn.Parameter(absent, requires_grad=False))
        try:
            yield
        finally:
            del self._parameters["_absent"]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input_ids: Tensor) -> Tensor:
        """Rows [..., d] of `input_ids` [...], as the full matrix with the trained rows written in would give."""
        refuse_data_parallel(self)
        return self.owner._look_up(input_ids)

    def _look_up(self, input_ids: Tensor) -> Tensor:
        rows = self._overlay[0].active_rows() if self._overlay else None
        if rows is None or not (len(rows) or grows_now(rows, self.training)):
            return self._own(input_ids)
        return self._over(input_ids, rows).to(self.weight.dtype)

    def _over(self, input_ids: Tensor, rows: PartialRows) -> Tensor:
        """An adapter's rows over what is there without it."""
        if self.is_shrunk or rows.unseen == "error":
            return self._partial(input_ids, rows, self._own, rows.unseen)
        positions = rows.positions(input_ids)
        self._count_unseen(positions, rows)
        seen = (positions >= 0).unsqueeze(-1)
        return torch.where(seen, self._embed(positions, rows), self._own(input_ids))

    def _own(self, input_ids: Tensor) -> Tensor:
        if not self.is_shrunk:
            return super().forward(input_ids)
        if self.token_ids is None:
            return self._from_base(input_ids)
        return self._partial(input_ids, self, self._from_base, "base")

    def _partial(self, input_ids: Tensor, rows: RowTable, elsewhere: Lookup, unseen: str) -> Tensor:
        """Rows where there are, `elsewhere` for the rest.

        In training on an accelerator nobody waits for the device to say whether there is a rest: the data were
        scanned. The watch says so at the next step if that was not true. Rows that grow do wait, and so does a forward
        without a graph, which trains nothing.
        """
        if rows.grows_over is None:
            return self._embed_where_seen(input_ids, rows, elsewhere, unseen)
        with GROWTH:
            if not grows_now(rows, self.training):
                return self._embed_where_seen(input_ids, rows, elsewhere, unseen)
            refuse_replicas(rows)
            note_thread(rows)
            return self._embed(self._grown_positions(input_ids, rows), rows)

    def _embed_where_seen(self, input_ids: Tensor, rows: RowTable, elsewhere: Lookup, unseen: str) -> Tensor:
        positions = rows.positions(input_ids)
        if self.training and input_ids.is_cuda and rows.grows_over is None and torch.is_grad_enabled():
            self._watch.look(input_ids, positions)
            return self._embed(positions, rows)
        if unseen != "error":
            self._count_unseen(positions, rows)
        if not _any_negative(positions):
            return self._embed(positions, rows)
        missing = positions < 0
        if unseen == "error":
            raise UnseenTokenError(_unseen_message(input_ids[missing]))
        found = self._embed(positions, rows)
        return found.masked_scatter(missing.unsqueeze(-1), elsewhere(input_ids[missing]).to(found.dtype))

    def _count_unseen(self, positions: Tensor, rows: RowTable) -> None:
        """Count tokens without a row where rows train; on the CPU alone, where nobody waits for a device."""
        trains = self.training and rows.weight.requires_grad and torch.is_grad_enabled()
        if trains and positions.device.type == "cpu" and not self._count.has_warned:
            self._count.add(positions.numel(), int((positions.numpy() < 0).sum()))

    def _grown_positions(self, input_ids: Tensor, rows: RowTable) -> Tensor:
        """The position of each token; one that had no row has one now, as it is without an overlay."""
        positions = rows.positions(input_ids)
        if _any_negative(positions):
            token_ids = torch.unique(input_ids[positions < 0])
            rows.add_rows(token_ids, self.rows(token_ids))
            positions = rows.positions(input_ids)
        return positions

    def _embed(self, positions: Tensor, rows: RowTable) -> Tensor:
        """Embed from `rows`; the first row stands in where there is none. As ever, the padding row gets no gradient."""
        return functional.embedding(
            positions.clamp(min=0),
            rows.live_weight(),
            rows.position_of(self.padding_idx),
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    def _from_base(self, input_ids: Tensor) -> Tensor:
        assert self.base is not None
        check_range(input_ids, self.vocab_size)
        unique, inverse = torch.unique(input_ids, return_inverse=True)
        rows = self.base.rows(unique.cpu()).to(self.weight.device, self.weight.dtype)
        return rows if torch.equal(unique, input_ids) else functional.embedding(inverse, rows)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._watch.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        """V, d and what of it is in memory."""
        where = f"{self.weight.shape[0]:,} rows in memory" if self.is_shrunk else "full"
        return f"{super().extra_repr()}, {where}"


def convert(embedding: nn.Embedding, owner: PartialEmbedding | None = None) -> PartialEmbedding:
    """Make `embedding` a `PartialEmbedding` in place, still full; `owner` where it shares its weight with another.

    A subclass of `nn.Embedding` with a forward of its own (mBART, PLBart and Gemma scale the output) keeps it.
    """
    if isinstance(embedding, PartialEmbedding):
        return embedding
    embedding.__class__ = _partial_class(type(embedding))  # type: ignore[arg-type]
    partial: Any = embedding
    partial.register_buffer("token_ids", None)
    partial.register_buffer("fingerprint", None)
    partial.base, partial._overlay, partial._watch = None, (), UnseenWatch()
    partial._count = UnseenCount()
    partial._owner = () if owner is None else (owner,)
    partial._forget_index()
    return partial  # type: ignore[no-any-return]


def sites(root: nn.Module, embedding: nn.Embedding) -> dict[str, nn.Embedding]:
    """Names and modules of every `nn.Embedding` under `root` whose weight is the weight of `embedding`, that one
    first.
    """
    found = {
        name: module
        for name, module in root.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is embedding.weight
    }
    return dict(sorted(found.items(), key=lambda item: item[1] is not embedding))


def convert_all(root: nn.Module, embedding: nn.Embedding) -> PartialEmbedding:
    """`convert` every site of `embedding` under `root`; returns the one that speaks for all."""
    owner = convert(embedding)
    for module in sites(root, embedding).values():
        if module is not owner:
            convert(module, owner)
    return owner


def parts_of(root: nn.Module, owner: PartialEmbedding) -> dict[str, PartialEmbedding]:
    """Names and modules of every embedding under `root` that `owner` speaks for, itself included."""
    modules = root.named_modules()
    return {name: part for name, part in modules if isinstance(part, PartialEmbedding) and part.owner is owner}


def revert(embedding: PartialEmbedding) -> None:
    """Undo `convert` on a full embedding: class and attributes are as they were."""
    classes = (c for c in type(embedding).__mro__ if issubclass(c, nn.Embedding))
    original = next(c for c in classes if not issubclass(c, PartialEmbedding))
    for name in ("token_ids", "fingerprint"):
        embedding._buffers.pop(name)
    optimizer_state.forget(embedding)
    for name in _OWN_ATTRIBUTES:
        embedding.__dict__.pop(name, None)
    embedding.__class__ = original  # type: ignore[assignment]


@cache
def _partial_class(original: type[nn.Embedding]) -> type[PartialEmbedding]:
    if original is nn.Embedding:
        return PartialEmbedding
    return type(f"Partial{original.__name__}", (original, PartialEmbedding), {})


def _any_negative(positions: Tensor) -> bool:
    """Whether a position is missing; on the CPU read as memory, for there is no device to wait for."""
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
