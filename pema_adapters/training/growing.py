"""Rows that come while training goes on: `PEMAConfig(vocabulary="grow")`.

A table that grows has exactly the K rows that it has met, without spare capacity. Rows are sorted by token, in the
optimizer's state as in the model, so that a checkpoint of both resumes: a token in between moves what lies behind it
whether there is room or not. At a step that brings new tokens, K rows of weight and state are copied: 1.4 times the
AdamW step over the same rows (K = 20,000, d = 768, CPU), and no shape or file ever shows a row that is no token's.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.training.layout import LaidOut


class Growing(LaidOut, Protocol):
    """A table that may get rows; `grows_over`: where their values come from, None while it stays as it is."""

    grows_over: Any

    def add_gradient(self, gradient: Tensor) -> None:
        """Add to the gradient of the weight, [K, d] both."""


class LiveRows(torch.autograd.Function):
    """The weight of a table [K, d], in a graph that outlives a change of K.

    Two forwards before one backward (or encoder and decoder): where the second brings rows, the gradient of the first
    has the old shape. It is then carried to the rows of today and added to the weight's gradient here; so the order of
    additions, and with it the last bit, may differ where encoder and decoder grow while gradients accumulate.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, table: Growing) -> Tensor:
        """The weight as it is."""
        ctx.table, ctx.layout = table, table.layout
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        """`gradient` [k, d] where the rows are the same, else none, for it is added already."""
        if ctx.layout.agrees(ctx.table.layout):
            return gradient, None
        ctx.table.add_gradient(ctx.table.layout.carry(gradient, ctx.layout))
        return None, None


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
