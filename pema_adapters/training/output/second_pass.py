"""The second pass over a head's matrix: gradients of trained rows and of biases, from the log-sum-exp of the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.training.output.head_function import Head
from pema_adapters.training.output.transforms import AddBias

TOKEN_BLOCK = 2048
"""Number of tokens whose logits for a block of rows are in memory at once."""


def refuse_second_derivative() -> None:
    """Refuse a backward pass that builds a graph of its own: the result would lack second derivatives.

    Raises:
        SurgeryError: gradients are computed with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise SurgeryError(
            "second derivatives (create_graph=True) of the logits of a language model with PEMA are not computed: "
            "call restore_embeddings(model) first"
        )


class SecondPass:
    """The gradients of trained rows and of biases, once the log-sum-exp is known.

    Args:
        head: gives the logits.
        hidden: [N, d], in the dtype of computation.
        targets: [N], if their logits were wanted.
        logsumexp: [N], if it was.
        gradients: [N] each, of the log-sum-exp, of the target logits and of the mean.
    """

    def __init__(
        self, head: Head, hidden: Tensor, targets: Tensor | None, logsumexp: Tensor | None,
        gradients: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        self._head, self._hidden, self._targets, self._logsumexp = head, hidden, targets, logsumexp
        self._by_logsumexp, self._by_target, self._by_mean = gradients

    def run(self, with_rows: bool, with_biases: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of the trained rows [K, d] and of the biases [V]."""
        head, rows = self._head, self._head.matrix.rows
        by_row = None
        if with_rows and rows is not None:
            by_row = torch.empty_like(rows) if len(self._hidden) else torch.zeros_like(rows)
        by_bias = {
            number: self._hidden.new_zeros(head.matrix.vocab_size)
            for number, part in enumerate(head.transforms.parts)
            if with_biases and isinstance(part, AddBias)
        }
        for block in self._iterate(over_all=with_biases):
            self._add(block, by_row, by_bias)
        if not with_biases:
            return by_row, [None] * len(head.biases)
        return by_row, [each.to(bias.dtype) for each, bias in zip(by_bias.values(), head.biases, strict=True)]

    def _iterate(self, over_all: bool) -> Iterator[_Columns]:
        matrix = self._head.matrix
        if not over_all:
            for begin, end, rows in matrix.iterate_trained():
                assert matrix.token_ids is not None
                yield _Columns(rows, matrix.token_ids[begin:end], begin, end, None)
            return
        for first, block in matrix.iterate_blocks():
            ids = slice(first, first + len(block))
            begin, end = matrix.find_trained(ids.start, ids.stop)
            columns = None if matrix.token_ids is None else matrix.token_ids[begin:end] - first
            yield _Columns(block, ids, begin, end, columns)

    def _add(self, columns: _Columns, by_row: Tensor | None, by_bias: dict[int, Tensor]) -> None:
        total = None
        for begin in range(0, len(self._hidden), TOKEN_BLOCK):
            tokens = slice(begin, begin + TOKEN_BLOCK)
            sums: dict[int, Tensor] = {}
            gradient = self._compute_gradient(columns, tokens, sums if by_bias else None)
            for number, each in sums.items():
                by_bias[number][columns.token_ids] += each
            if by_row is None or columns.begin == columns.end:
                continue
            trained = gradient if columns.trained is None else gradient[:, columns.trained]
            part = trained.t() @ self._hidden[tokens]
            total = part if total is None else total.add_(part)
        if by_row is not None and total is not None:
            by_row[columns.begin : columns.end] = total

    def _compute_gradient(self, columns: _Columns, tokens: slice, sums: dict[int, Tensor] | None) -> Tensor:
        """Return the gradient [n, B] of the matrix product of some tokens with some rows."""
        product = self._hidden[tokens] @ columns.rows.t()
        logits, results = self._head.transforms.forward(product, columns.token_ids)
        if self._by_logsumexp is None or self._logsumexp is None:
            gradient = torch.zeros_like(logits)
        else:
            gradient = logits.sub_(self._logsumexp[tokens].unsqueeze(-1)).exp_()
            gradient.mul_(self._by_logsumexp[tokens].unsqueeze(-1))
        if self._by_mean is not None:
            gradient.add_(self._by_mean[tokens].unsqueeze(-1) / self._head.matrix.vocab_size)
        if self._by_target is not None and self._targets is not None:
            position, is_inside = self._locate_targets(columns, tokens)
            by_target = (self._by_target[tokens] * is_inside).unsqueeze(-1)
            gradient.scatter_add_(1, position.clamp(0, gradient.shape[1] - 1).unsqueeze(-1), by_target)
        return self._head.transforms.backward(gradient, results, sums)

    def _locate_targets(self, columns: _Columns, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return the column of each token's target, and whether it is among these columns."""
        assert self._targets is not None
        if isinstance(columns.token_ids, slice):
            position = self._targets[tokens] - columns.token_ids.start
            return position, (position >= 0) & (position < len(columns.rows))
        position, is_trained = self._head.matrix.locate(self._targets[tokens])
        position = position - columns.begin
        return position, is_trained & (position >= 0) & (position < len(columns.rows))


@dataclass(frozen=True)
class _Columns:
    """Some columns of the logits.

    Attributes:
        rows: [B, d], of the matrix.
        token_ids: of the columns.
        begin: the first of the trained rows among them, as a position in [0, K).
        end: the position after the last.
        trained: the columns of these rows; None: all columns.
    """

    rows: Tensor
    token_ids: Tensor | slice
    begin: int
    end: int
    trained: Tensor | None
