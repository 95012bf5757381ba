"""Rows that come while training goes on: `PEMAConfig(vocabulary="grow")`.

A table that grows has exactly the K rows that it has met, without spare capacity. Rows are sorted by token, in the
optimizer's state as in the model, so that a checkpoint of both resumes: a token in between moves what lies behind it
whether there is room or not. At a step that brings new tokens, K rows of weight and state are copied: 1.4 times the
AdamW step over the same rows (K = 20,000, d = 768, CPU), and no shape or file ever shows a row that is no token's.
"""

from __future__ import annotations

from threading import RLock, get_ident
from typing import Any, Protocol

import torch
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.training.embedding.row_index import LaidOut

GROWTH = RLock()
"""Held where rows of a table that grows are found and read, or its gradient is added to: threads take turns."""

SEVERAL = -1


class Growing(LaidOut, Protocol):
    """A table that may get rows; `grows_over`: where their values come from, None while it stays as it is.

    grown_by: the thread whose forwards bring rows; SEVERAL once there were two.
    """

    grows_over: Any
    grown_by: int | None

    def add_gradient(self, gradient: Tensor) -> None:
        """Add to the gradient of the weight, [K, d] both."""


class LiveRows(torch.autograd.Function):
    """The weight of a table [K, d], in a graph that outlives a change of K.

    Two forwards before one backward (or encoder and decoder): where the second brings rows, the gradient of the first
    has the old shape. It is then carried to the rows of today and added to the weight's gradient here; so the order of
    additions, and with it the last bit, may differ where encoder and decoder grow while gradients accumulate. Where
    several threads train, every gradient is added here, under the lock: rows may come before autograd would add it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Growing) -> Tensor:
        """The weight as it is."""
        ctx.table, ctx.layout = table, table.layout
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        """`gradient` [k, d] where the rows are the same, else none, for it is added already."""
        table = ctx.table
        with GROWTH:
            agrees = ctx.layout.agrees(table.layout)
            if agrees and table.grown_by != SEVERAL:
                return gradient, None
            table.add_gradient(gradient.clone() if agrees else table.layout.carry(gradient, ctx.layout))
        return None, None


def note_thread(table: Growing) -> None:
    """Note which thread's forward is about to add rows to `table`."""
    thread = get_ident()
    if table.grown_by is None:
        table.grown_by = thread
    elif table.grown_by != thread:
        table.grown_by = SEVERAL


def grows_now(table: Growing, training: bool) -> bool:
    """Whether tokens that a forward meets get rows: where it is one of training, with a graph."""
    return training and table.grows_over is not None and table.weight.requires_grad and torch.is_grad_enabled()


def refuse_replicas(table: Growing) -> None:
    """Raise SurgeryError where several replicas train: each would meet other tokens, and have other rows."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if (distributed and torch.distributed.get_world_size() > 1) or not table.weight.is_leaf:
        raise SurgeryError(
            'vocabulary="grow" works in one process on one device, for every replica would add other rows: '
            "scan the data beforehand and give them to shrink_embeddings, with PEMAConfig() as it is"
        )
