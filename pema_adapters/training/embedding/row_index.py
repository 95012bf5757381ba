"""Which token each row of a table belongs to, and carrying what lies beside the rows from one layout to the next.

Rows are always sorted by token id: in memory, in state dicts and in the optimizer's state. So a token that comes later
moves rows, and whatever is a number for each row has to move along: a gradient, momentum, the gradient of a graph that
was made before.

    layout of 3 5 9, gradient a b c   ->   layout of 3 4 5 9, gradient a 0 b c
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Layout:
    """The token ids of a table's rows, int32 [K] on the CPU, strictly increasing. Immutable: a change makes another.

    `since` [K] is the size that the table had when the row came. As rows are only added, that tells every layout that
    this one has grown out of by its size.
    """

    def __init__(self, token_ids: Tensor, since: Tensor | None = None) -> None:
        self.token_ids = token_ids
        self.since = torch.full_like(token_ids, len(token_ids)) if since is None else since

    def __len__(self) -> int:
        return len(self.token_ids)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: object) -> Layout:
        return self

    def agrees(self, other: Layout) -> bool:
        """Whether both have the same tokens."""
        return self is other or torch.equal(self.token_ids, other.token_ids)

    def lies_within(self, other: Layout) -> bool:
        """Whether `other` has every token of this one."""
        return int((other.origin(self) >= 0).sum()) == len(self)

    def with_tokens(self, token_ids: Tensor) -> Layout:
        """A layout that has `token_ids` [n] as well."""
        grown = Layout(torch.unique(torch.cat([self.token_ids, token_ids.cpu().to(torch.int32)])))
        return Layout(grown.token_ids, grown.carry(self.since, self, len(grown)))

    def former(self, count: int) -> Layout | None:
        """The layout of `count` rows that this one has grown out of, None where there was none of that size."""
        there = self.since <= count
        return Layout(self.token_ids[there], self.since[there]) if int(there.sum()) == count else None

    def origin(self, old: Layout) -> Tensor:
        """Where each row comes from: its place in the `old` layout, int64 [K]; -1 for a row that is new."""
        if not len(old):
            return torch.full((len(self),), -1)
        places = torch.searchsorted(old.token_ids, self.token_ids).clamp(max=len(old) - 1)
        return torch.where(old.token_ids[places] == self.token_ids, places, -1)

    def carry(self, values: Tensor, old: Layout, fill: float = 0.0) -> Tensor:
        """`values` [k, ...], a row for each token of the `old` layout, as [K, ...]; rows that are new hold `fill`."""
        origin = self.origin(old).to(values.device)
        if not len(old) or not len(self):
            return values.new_full((len(self), *values.shape[1:]), fill)
        carried = (values.to_dense() if values.is_sparse else values).index_select(0, origin.clamp(min=0))
        carried[origin < 0] = fill
        return carried


class LaidOut(Protocol):
    """A table with a row in `weight` [K, d] for each token of its `layout`."""

    weight: Tensor

    @property
    def layout(self) -> Layout:
        """What its rows are now."""


def replace_data(parameter: nn.Parameter | Tensor, data: Tensor) -> None:
    """Put `data` of another shape behind a Parameter, and drop its gradient.

    Graphs that are alive hold the node that adds up its gradient, with the shape it had; torch goes on using that node
    for new graphs, which then fail. It lets go of the node where the dtype changes, so the dtype does, for a moment.
    """
    other = torch.float16 if data.dtype == torch.float32 else torch.float32  # both exist on every device
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
