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

from pema_adapters.errors import TokenRangeError, UnseenTokenError
from pema_adapters.training.watch import UnseenWatch

Lookup = Callable[[Tensor], Tensor]


class Overlay(Protocol):
    """Who provides rows that lie over an embedding, if any: the adapters-facing layer."""

    def active_rows(self) -> PartialRows | None:
        """The rows of the active adapter, or None."""


class RowSource(Protocol):
    """Where base rows come from."""

    def rows(self, token_ids: Tensor) -> Tensor:
        """Rows [n, d] of `token_ids` [n], both on the CPU."""


class RowTable(nn.Module):
    """K rows of a matrix [V, d]: what `PartialRows` and a `PartialEmbedding` with own rows share.

    Attributes: `weight` [K, d]; `token_ids` int32 [K], strictly increasing; `fingerprint` uint8 [n], the description of
    the base that `formats.fingerprint` reads; `vocab_size` V.
    """

    weight: Tensor
    token_ids: Tensor | None
    fingerprint: Tensor | None
    vocab_size: int
    _index: Tensor | None
    _padding: tuple[int, int | None] | None

    def set_rows(self, token_ids: Tensor, rows: Tensor, fingerprint: Tensor) -> None:
        """Hold `rows` [K, d] for `token_ids` [K]; the Parameter keeps its identity, a gradient is dropped."""
        device = self.weight.device
        self.weight.grad = None
        self.weight.data = rows.to(device)
        self.token_ids = token_ids.to(device, torch.int32)
        self.fingerprint = fingerprint.to(device)
        self._forget_index()

    def positions(self, input_ids: Tensor) -> Tensor:
        """Compact positions, int32, shaped as `input_ids`; -1 where a token has no row here."""
        index = self._token_index()
        _check_range(input_ids, self.vocab_size)
        return index.index_select(0, input_ids.reshape(-1)).view(input_ids.shape)

    def position_of(self, token_id: int | None) -> int | None:
        """The compact position of one token, None where it has none. Remembered: it may cost a synchronisation."""
        if token_id is None or self.token_ids is None:
            return None
        if self._padding is None or self._padding[0] != token_id:
            found = (self.token_ids == token_id).nonzero().flatten().tolist()
            self._padding = (token_id, found[0] if found else None)
        return self._padding[1]

    def _forget_index(self) -> None:
        self._index = self._padding = None

    def _token_index(self) -> Tensor:
        """The inverse of token_ids, int32 [V]: derived, so never saved and rebuilt wherever the module goes."""
        if self._index is None or self._index.device != self.weight.device:
            assert self.token_ids is not None
            ids = self.token_ids.to(self.weight.device)
            index = torch.full((self.vocab_size,), -1, dtype=torch.int32, device=ids.device)
            index[ids.long()] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
            self._index = index
        return self._index

    def _load_from_state_dict(  # noqa: PLR0913, PLR0917 - torch's signature
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take another number of rows when the state brings its token ids along; optimizer state survives."""
        problem = self._make_room(state_dict, prefix)
        if problem:
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._forget_index()

    def _make_room(self, state_dict: dict[str, Tensor], prefix: str) -> str | None:
        token_ids, rows = state_dict.get(prefix + "token_ids"), state_dict.get(prefix + "weight")
        if self.token_ids is None or token_ids is None or rows is None:
            return None
        problem = _invalid(token_ids, rows, self.vocab_size)
        if problem:
            return f"{prefix}token_ids: {problem}"
        for name in ("weight", "token_ids", "fingerprint"):
            new, current = state_dict.get(prefix + name), getattr(self, name)
            if new is not None and current is not None and new.shape[0] != current.shape[0]:
                current.data = current.data.new_empty((new.shape[0], *current.shape[1:]))
        return None


class PartialRows(RowTable):
    """The rows that one adapter trains; none until it has a vocabulary.

    Args: `vocab_size` V, `dim` d, and the `device` and `dtype` of the matrix.
    """

    token_ids: Tensor
    fingerprint: Tensor

    def __init__(self, vocab_size: int, dim: int, device: torch.device, dtype: torch.dtype, unseen: str) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.unseen = unseen
        self.weight = nn.Parameter(torch.empty(0, dim, device=device, dtype=dtype))
        self.register_buffer("token_ids", torch.empty(0, device=device, dtype=torch.int32))
        self.register_buffer("fingerprint", torch.empty(0, device=device, dtype=torch.uint8))
        self._forget_index()

    def __len__(self) -> int:
        return len(self.token_ids)

    def __bool__(self) -> bool:
        return True

    def extra_repr(self) -> str:
        """K of V, d."""
        return f"{len(self):,} of {self.vocab_size:,} rows, {self.weight.shape[1]}"


class PartialEmbedding(RowTable, nn.Embedding):
    """An `nn.Embedding` [V, d] of which only some rows are in memory. Made by `convert`, never constructed.

    `num_embeddings` and `padding_idx` keep their meaning in the full vocabulary; original token ids go in.
    """

    base: RowSource | None
    _watch: UnseenWatch
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
        self.base = base
        self.weight.grad = None
        self.weight.data = self.weight.data.new_empty(0, self.embedding_dim)

    def restore(self, matrix: Tensor) -> None:
        """Hold `matrix` [V, d] again, in the dtype and on the device of the weight."""
        self.base = self.token_ids = self.fingerprint = None
        self._forget_index()
        self.weight.grad = None
        self.weight.data = matrix.to(self.weight.device, self.weight.dtype)

    def rows(self, token_ids: Tensor) -> Tensor:
        """The rows [n, d] of `token_ids` [n] as they are without an overlay, detached."""
        with torch.no_grad():
            return self._own(token_ids.to(self.weight.device))

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
        return self.owner._look_up(input_ids)

    def _look_up(self, input_ids: Tensor) -> Tensor:
        rows = self._overlay[0].active_rows() if self._overlay else None
        if rows is None or not len(rows):
            return self._own(input_ids)
        if self.is_shrunk or rows.unseen == "error":
            return self._partial(input_ids, rows, self._own, rows.unseen)
        positions = rows.positions(input_ids)
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
        scanned. The watch says so at the next step if that was not true.
        """
        positions = rows.positions(input_ids)
        if self.training and input_ids.is_cuda:
            self._watch.look(input_ids, positions)
            return self._embed(positions, rows)
        if not _any_negative(positions):
            return self._embed(positions, rows)
        missing = positions < 0
        if unseen == "error":
            raise UnseenTokenError(_unseen_message(input_ids[missing]))
        found = self._embed(positions, rows)
        return found.masked_scatter(missing.unsqueeze(-1), elsewhere(input_ids[missing]).to(found.dtype))

    def _embed(self, positions: Tensor, rows: RowTable) -> Tensor:
        """Embed from `rows`; the first row stands in where there is none. As ever, the padding row gets no gradient."""
        return functional.embedding(
            positions.clamp(min=0),
            rows.weight,
            rows.position_of(self.padding_idx),
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    def _from_base(self, input_ids: Tensor) -> Tensor:
        assert self.base is not None
        _check_range(input_ids, self.vocab_size)
        unique, inverse = torch.unique(input_ids, return_inverse=True)
        rows = self.base.rows(unique.cpu()).to(self.weight.device, self.weight.dtype)
        return functional.embedding(inverse, rows)

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


def revert(embedding: PartialEmbedding) -> None:
    """Undo `convert` on a full embedding: class and attributes are as they were."""
    classes = (c for c in type(embedding).__mro__ if issubclass(c, nn.Embedding))
    original = next(c for c in classes if not issubclass(c, PartialEmbedding))
    for name in ("token_ids", "fingerprint"):
        embedding._buffers.pop(name)
    for name in ("base", "_overlay", "_watch", "_owner", "_index", "_padding"):
        embedding.__dict__.pop(name)
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


def _check_range(input_ids: Tensor, vocab_size: int) -> None:
    """On the CPU refuse ids outside [0, V); elsewhere the device does, as it does for `nn.Embedding`."""
    if input_ids.device.type != "cpu" or not input_ids.numel():
        return
    values = input_ids.detach().numpy()
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise TokenRangeError(
            f"input_ids hold token id {wrong}, but the embedding has rows 0 to {vocab_size - 1}: "
            "is the tokenizer that of this model, and were new tokens followed by resize_token_embeddings?"
        )


def _unseen_message(token_ids: Tensor) -> str:
    unique = torch.unique(token_ids).tolist()
    some = ", ".join(map(str, unique[:5])) + (", ..." if len(unique) > 5 else "")
    return (
        f'{len(unique)} token ids are outside the partial vocabulary ({some}) and PEMAConfig(unseen="error") refuses '
        'them: scan this data too, or use PEMAConfig(unseen="base") to read their rows from the base'
    )


def _invalid(token_ids: Tensor, rows: Tensor, vocab_size: int) -> str | None:
    if token_ids.ndim != 1 or token_ids.shape[0] != rows.shape[0]:
        return f"{tuple(token_ids.shape)} ids do not match {tuple(rows.shape)} rows"
    if token_ids.device.type == "meta" or not len(token_ids):
        return None
    if bool((token_ids[1:] <= token_ids[:-1]).any()):
        return "ids are not strictly increasing"
    if int(token_ids[0]) < 0 or int(token_ids[-1]) >= vocab_size:
        return f"ids {int(token_ids[0])} to {int(token_ids[-1])} do not fit the model's {vocab_size} embedding rows"
    return None
