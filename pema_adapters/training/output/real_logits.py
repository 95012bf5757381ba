"""The product of hidden states with a head's matrix: real logits [..., V], for code that needs every one of them."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional

from pema_adapters.training.output.head_matrix import HeadMatrix, without_autocast
from pema_adapters.training.output.second_pass import refuse_second_derivative


def compute_logits(
    hidden: Annotated[Tensor, "Float *batch d"], matrix: HeadMatrix, bias: Annotated[Tensor, "Float V"] | None
) -> Annotated[Tensor, "Float *batch V"]:
    """Return logits [..., V] of hidden states [..., d], in the dtype of the hidden states and in the graph."""
    if not isinstance(matrix.base, Tensor) or not _is_like(matrix.base, hidden):
        flat = _Logits.apply(hidden.reshape(-1, hidden.shape[-1]), matrix.rows, bias, matrix)  # type: ignore[no-untyped-call]
        return flat.view(*hidden.shape[:-1], matrix.vocab_size)  # type: ignore[no-any-return]
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = functional.linear(hidden, matrix.base.detach(), bias)
    if matrix.rows is None:
        return logits
    assert matrix.token_ids is not None
    at_rows = None if bias is None else bias[matrix.token_ids]
    trained = functional.linear(hidden, matrix.rows.to(hidden.dtype), at_rows)
    return logits.index_copy(-1, matrix.token_ids, trained)


def _is_like(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors can be multiplied without a copy of either."""
    return one.device == other.device and one.dtype == other.dtype


class _Logits(torch.autograd.Function):
    """Logits of a head whose matrix is read in blocks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor | None, bias: Tensor | None, matrix: HeadMatrix) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(hidden, rows, bias)
        inputs = hidden.to(matrix.compute_dtype)
        logits = inputs.new_empty(len(inputs), matrix.vocab_size, dtype=hidden.dtype)
        with without_autocast(hidden.device):
            for first, product in matrix.iterate_products(inputs):
                part = slice(first, first + product.shape[1])
                logits[:, part] = product if bias is None else product.add_(bias[part])
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        refuse_second_derivative()
        with without_autocast(gradient.device):
            return _Logits._differentiate(ctx, gradient)

    @staticmethod
    def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (hidden, rows, bias), matrix = ctx.saved_tensors, ctx.matrix
        by_hidden = by_row = by_bias = None
        if ctx.needs_input_grad[0]:
            by_hidden = torch.zeros_like(hidden, dtype=matrix.compute_dtype)
            for first, block in matrix.iterate_blocks():
                by_hidden.addmm_(gradient[:, first : first + len(block)].to(block.dtype), block)
            by_hidden = by_hidden.to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            inputs = hidden.to(matrix.compute_dtype)
            by_row = (gradient[:, matrix.token_ids].to(inputs.dtype).t() @ inputs).to(rows.dtype)
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum(0, dtype=matrix.compute_dtype).to(bias.dtype)
        return by_hidden, by_row, by_bias, None
