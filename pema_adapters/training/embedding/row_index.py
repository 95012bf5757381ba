"""Which token each row of a table belongs to, and how per-row values move when rows are added.

Rows are sorted by token id: in memory, in state dicts and in optimizer state. So a new token shifts the rows after it,
and everything that has one entry per row shifts along: the gradient, momentum, the gradient of an older graph.

    index 3 5 9, gradient a b c   ->   index 3 4 5 9, gradient a 0 b c
"""

from __future__ import annotations

from typing import Annotated, Protocol

import torch
from torch import Tensor, nn


class RowIndex:
    """The token ids of a table's rows. Immutable: a change makes another index.

    Attributes:
        token_ids: int32 [K] on the CPU, strictly increasing.
        size_when_added: int32 [K], the size of the table when it got the row. Since rows are only ever added, this
            tells every earlier index apart by its size (see `ancestor`).
    """

    def __init__(
        self, token_ids: Annotated[Tensor, "Int32 K"], size_when_added: Annotated[Tensor, "Int32 K"] | None = None
    ) -> None:
        self.token_ids = token_ids
        if size_when_added is None:
            size_when_added = torch.full_like(token_ids, len(token_ids))
        self.size_when_added = size_when_added

    def __len__(self) -> int:
        return len(self.token_ids)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: object) -> RowIndex:
        return self

    def has_same_tokens(self, other: RowIndex) -> bool:
        """Return whether both indices have the same tokens."""
        return self is other or torch.equal(self.token_ids, other.token_ids)

    def is_subset_of(self, other: RowIndex) -> bool:
        """Return whether `other` has every token of this index."""
        return int((other.positions_in(self) >= 0).sum()) == len(self)

    def with_tokens(self, token_ids: Annotated[Tensor, "Shaped n"]) -> RowIndex:
        """Return an index with the tokens of this one and `token_ids` [n]."""
        grown = RowIndex(torch.unique(torch.cat([self.token_ids, token_ids.cpu().to(torch.int32)])))
        return RowIndex(grown.token_ids, grown.remap(self.size_when_added, self, len(grown)))

    def ancestor(self, count: int) -> RowIndex | None:
        """Return the index of `count` rows that this one has grown from, None if there was none of that size."""
        known = self.size_when_added <= count
        if int(known.sum()) != count:
            return None
        return RowIndex(self.token_ids[known], self.size_when_added[known])

    def positions_in(self, old: RowIndex) -> Annotated[Tensor, "Int64 K"]:
        """Return the position [K] in `old` of each row of this index, -1 for a row that `old` lacks."""
        if not len(old):
            return torch.full((len(self),), -1)
        positions = torch.searchsorted(old.token_ids, self.token_ids).clamp(max=len(old) - 1)
        return torch.where(old.token_ids[positions] == self.token_ids, positions, -1)

    def remap(
        self, values: Annotated[Tensor, "Shaped k *rest"], old: RowIndex, fill: float = 0.0
    ) -> Annotated[Tensor, "Shaped K *rest"]:
        """Move per-row values from another index to this one.

        Args:
            values: [k, ...], one entry for each row of `old`; sparse values come back dense.
            old: the index of `values`.
            fill: the entries of rows that `old` lacks.

        Returns:
            The values [K, ...] for the rows of this index.
        """
        positions = self.positions_in(old).to(values.device)
        if not len(old) or not len(self):
            return values.new_full((len(self), *values.shape[1:]), fill)
        moved = (values.to_dense() if values.is_sparse else values).index_select(0, positions.clamp(min=0))
        moved[positions < 0] = fill
        return moved


class HasRowIndex(Protocol):
    """A table whose `weight` [K, d] has a row for each token of its `row_index`."""

    weight: Tensor

    @property
    def row_index(self) -> RowIndex:
        """The tokens of its rows now."""


def replace_data(parameter: nn.Parameter | Tensor, data: Tensor) -> None:
    """Give a Parameter `data` of another shape, and drop its gradient.

    A live graph keeps the node that accumulates this Parameter's gradient, with the old shape, and torch would reuse
    that node in new graphs, which then fail. torch drops the node when the dtype changes, so it changes for a moment.
    """
    other = torch.float16 if data.dtype == torch.float32 else torch.float32  # both exist on every device
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
