"""Rows added during training, `PEMAConfig(vocabulary="grow")`: when a table grows, and graphs that outlive growth.

A growing table has exactly the K rows of the tokens met so far, without spare capacity: rows are sorted by token, in
optimizer state as in the model, so that a checkpoint of both can be resumed, and a token in between shifts the rows
after it whether there is room or not. A step with new tokens copies K rows of weight and state, 1.4 times the cost of
AdamW's step over these rows (K = 20,000, d = 768, CPU). No tensor or file ever holds a row that belongs to no token.
"""

from __future__ import annotations

from threading import RLock, current_thread, get_ident, main_thread
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.training.embedding.row_index import HasRowIndex

GROWTH_LOCK = RLock()
"""Held while rows of a growing table are looked up or its gradient is added to: threads take turns."""

SEVERAL_THREADS = -1


class GrowableTable(HasRowIndex, Protocol):
    """A table that training may add rows to.

    Attributes:
        growth_source: where the values of new rows come from; None while the table does not grow.
        growing_thread: the main thread, if its forwards alone add rows; SEVERAL_THREADS if others do.
    """

    growth_source: Any
    growing_thread: int | None

    def add_gradient(self, gradient: Annotated[Tensor, "Float K d"]) -> None:
        """Add to the gradient of the weight, [K, d] both."""


class GrowableWeight(torch.autograd.Function):
    """A table's weight [K, d] in a graph that stays valid when K changes.

    Between a forward and its backward another forward may add rows (gradient accumulation; encoder and decoder), so
    that the first one's gradient has the old shape. It is then remapped and added to the weight's gradient here. The
    order of additions differs in that case, and with it possibly the last bit, where encoder and decoder grow while
    gradients accumulate. If several threads train, every gradient is added here, under the lock, since rows might be
    added before autograd accumulates it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: GrowableTable) -> Tensor:
        """Return the weight [K, d] unchanged."""
        ctx.table, ctx.row_index = table, table.row_index
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        """Return `gradient` [k, d] if the rows are still the same, else None: it has been added already."""
        table = ctx.table
        with GROWTH_LOCK:
            is_same = ctx.row_index.has_same_tokens(table.row_index)
            if is_same and table.growing_thread != SEVERAL_THREADS:
                return gradient, None
            table.add_gradient(gradient.clone() if is_same else table.row_index.remap(gradient, ctx.row_index))
        return None, None


def record_thread(table: GrowableTable) -> None:
    """Record that a forward of the current thread is about to add rows to `table`.

    A thread other than the main one counts as several at once: another one might add rows before autograd has
    accumulated the first one's gradient, which has fewer rows.
    """
    thread = get_ident()
    if table.growing_thread is None:
        table.growing_thread = thread if current_thread() is main_thread() else SEVERAL_THREADS
    elif table.growing_thread != thread:
        table.growing_thread = SEVERAL_THREADS


def is_growing(table: GrowableTable, training: bool) -> bool:
    """Return whether a forward adds rows for new tokens: in training mode, with gradients enabled."""
    return training and table.growth_source is not None and table.weight.requires_grad and torch.is_grad_enabled()


def refuse_replicas(table: GrowableTable) -> None:
    """Refuse to grow one of several replicas, each of which would meet other tokens and have other rows.

    Raises:
        SurgeryError: the process group has several ranks, or the module is a replica of `nn.DataParallel`.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if (distributed and torch.distributed.get_world_size() > 1) or not table.weight.is_leaf:
        raise SurgeryError(
            'vocabulary="grow" works in one process on one device, because every replica would add other rows: '
            "scan the data beforehand and give them to shrink_embeddings, with a PEMAConfig() that does not grow"
        )
