"""Log-sum-exp, target logits and mean of logits [N, V], and their gradients, without the logits.

The matrix of the head is read in blocks of rows. With the online softmax of flash attention (rows are its keys and its
values), one pass gives the log-sum-exp and its gradient with respect to the hidden states. Gradients of the K trained
rows need a second pass, over these rows alone; that of a bias [V], one over all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.training.output.head_matrix import HeadMatrix
from pema_adapters.training.output.transforms import AddBias, Transforms

TOKEN_BLOCK = 2048
"""Number of tokens whose logits for a block of rows are in memory at once."""


class LogitStatistics(NamedTuple):
    """Statistics of logits [N, V], in the graph; a statistic that was not asked for is None.

    Attributes:
        logsumexp: [N].
        target_logits: [N], the logit of each target.
        mean: [N], the mean over V.
    """

    logsumexp: Tensor | None
    target_logits: Tensor | None
    mean: Tensor | None


@dataclass(frozen=True)
class Head:
    """A head as a function of hidden states: a product with a matrix [V, d], then transforms."""

    matrix: HeadMatrix
    transforms: Transforms

    @property
    def biases(self) -> list[Tensor]:
        """The biases [V] of the transforms."""
        return [part.bias for part in self.transforms.parts if isinstance(part, AddBias)]


def compute_logit_statistics(
    head: Head,
    hidden: Annotated[Tensor, "Float N d"],
    targets: Annotated[Tensor, "Int64 N"] | None = None,
    *,
    logsumexp: bool = True,
    mean: bool = False,
) -> LogitStatistics:
    """Compute statistics of the logits of hidden states [N, d], in `matrix.compute_dtype`.

    Args:
        head: gives the logits.
        hidden: [N, d].
        targets: [N], within [0, V); their logits are returned.
        logsumexp: whether the log-sum-exp is wanted.
        mean: whether the mean is.
    """
    wanted = _Wanted(logsumexp, mean)
    return LogitStatistics(*_Statistics.apply(hidden, head.matrix.rows, targets, head, wanted, *head.biases))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Wanted:
    logsumexp: bool
    mean: bool


class _Statistics(torch.autograd.Function):
    """See `compute_logit_statistics`; the biases are arguments so that autograd sees them."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd's inputs are positional
        ctx: Any, hidden: Tensor, rows: Tensor | None, targets: Tensor | None, head: Head, wanted: _Wanted,
        *biases: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        inputs = hidden.detach().to(head.matrix.compute_dtype)
        totals = _Totals(inputs, wanted, with_gradient=ctx.needs_input_grad[0], vocab_size=head.matrix.vocab_size)
        if wanted.logsumexp or wanted.mean:
            for first, block in head.matrix.iterate_blocks():
                totals.add(head.transforms, block, slice(first, first + len(block)))
        logsumexp, mean = totals.finish()
        target_logits = at_target = None
        if targets is not None:
            target_logits, at_target = _compute_target_logits(head, inputs, targets)
        ctx.head = head
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            hidden, rows, targets, logsumexp, totals.logsumexp_gradient, at_target, totals.mean_gradient, *biases
        )
        return logsumexp, target_logits, mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative()
        hidden, _rows, targets, logsumexp, *by_hidden = ctx.saved_tensors[:7]
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            lse_gradient, target_gradient, mean_gradient = by_hidden
            order = (gradients[0], lse_gradient), (gradients[1], target_gradient), (gradients[2], mean_gradient)
            parts = [g.unsqueeze(-1) * unit for g, unit in order if g is not None and unit is not None]
            grad_hidden = torch.stack(parts).sum(0).to(hidden.dtype) if len(parts) > 1 else parts[0].to(hidden.dtype)
        needs_biases = any(ctx.needs_input_grad[5:])
        grad_rows, grad_biases = None, [None] * len(ctx.head.biases)
        if needs_biases or ctx.needs_input_grad[1]:
            second = _SecondPass(ctx.head, hidden.to(ctx.head.matrix.compute_dtype), targets, logsumexp, gradients)
            grad_rows, grad_biases = second.run(with_rows=ctx.needs_input_grad[1], with_biases=needs_biases)
        return grad_hidden, grad_rows, None, None, None, *grad_biases


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


class _Totals:
    """Running totals over blocks of rows: an online softmax, and the rows' mean weighted by it.

    Args:
        hidden: [N, d], in the dtype of computation.
        wanted: the statistics.
        with_gradient: whether the gradients of the statistics with respect to `hidden` are wanted.
        vocab_size: V.
    """

    def __init__(self, hidden: Tensor, wanted: _Wanted, with_gradient: bool, vocab_size: int) -> None:
        self._hidden, self._vocab_size = hidden, vocab_size
        self._highest = hidden.new_full((len(hidden),), torch.finfo(hidden.dtype).min) if wanted.logsumexp else None
        self._sum = hidden.new_zeros(len(hidden))
        self._mean = hidden.new_zeros(len(hidden)) if wanted.mean else None
        self.logsumexp_gradient = torch.zeros_like(hidden) if with_gradient and wanted.logsumexp else None
        self.mean_gradient = torch.zeros_like(hidden) if with_gradient and wanted.mean else None

    def add(self, transforms: Transforms, block: Tensor, token_ids: slice) -> None:
        """Add the logits of a block of rows."""
        for begin in range(0, len(self._hidden), TOKEN_BLOCK):
            tokens = slice(begin, min(begin + TOKEN_BLOCK, len(self._hidden)))
            logits, results = transforms.forward(self._hidden[tokens] @ block.t(), token_ids)
            if self._mean is not None:
                self._add_mean(tokens, logits, transforms, results, block)
            if self._highest is not None:
                self._add_exp(tokens, logits, transforms, results, block)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the log-sum-exp and the mean, and leave their gradients in the attributes."""
        if self.logsumexp_gradient is not None:
            self.logsumexp_gradient.div_(self._sum.unsqueeze(-1))
        return None if self._highest is None else self._highest + self._sum.log(), self._mean

    def _add_mean(
        self, tokens: slice, logits: Tensor, transforms: Transforms, results: list[Tensor], block: Tensor
    ) -> None:
        assert self._mean is not None
        self._mean[tokens] += logits.sum(1) / self._vocab_size
        if self.mean_gradient is not None:
            weights = transforms.backward(torch.full_like(logits, 1 / self._vocab_size), results)
            self.mean_gradient[tokens].addmm_(weights, block)

    def _add_exp(
        self, tokens: slice, logits: Tensor, transforms: Transforms, results: list[Tensor], block: Tensor
    ) -> None:
        assert self._highest is not None
        highest = torch.maximum(self._highest[tokens], logits.amax(1))
        weights = logits.sub_(highest.unsqueeze(-1)).exp_()
        shrink = (self._highest[tokens] - highest).exp_()
        self._highest[tokens] = highest
        self._sum[tokens] = self._sum[tokens] * shrink + weights.sum(1)
        if self.logsumexp_gradient is not None:
            weights = transforms.backward(weights, results)
            self.logsumexp_gradient[tokens].mul_(shrink.unsqueeze(-1)).addmm_(weights, block)


def _compute_target_logits(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the targets' logits [N], and their gradient [N, d] with respect to the hidden states."""
    rows = head.matrix.read_rows(targets)
    logits, results = head.transforms.forward((hidden * rows).sum(-1), targets)  # type: ignore[arg-type]
    slope = head.transforms.backward(torch.ones_like(logits), results)
    return logits, rows.mul_(slope.unsqueeze(-1))


class _SecondPass:
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
        by_row = torch.empty_like(rows) if with_rows and rows is not None else None
        by_bias = {
            number: self._hidden.new_zeros(head.matrix.vocab_size)
            for number, part in enumerate(head.transforms.parts)
            if with_biases and isinstance(part, AddBias)
        }
        for block in self._iterate(over_all=with_biases):
            self._add(block, by_row, by_bias)
        biases = [part.bias for part in head.transforms.parts if isinstance(part, AddBias)]
        sums = list(by_bias.values()) or [None] * len(biases)
        return by_row, [None if each is None else each.to(bias.dtype) for each, bias in zip(sums, biases, strict=True)]

    def _iterate(self, over_all: bool) -> Iterator[_Columns]:
        matrix = self._head.matrix
        if not over_all:
            for begin, end, rows in matrix.iterate_trained():
                assert matrix.token_ids is not None
                yield _Columns(rows, matrix.token_ids[begin:end], begin, end, None)
            return
        for first, block in matrix.iterate_blocks():
            ids = slice(first, first + len(block))
            begin = end = 0
            if matrix.ids_on_cpu is not None:
                begin, end = torch.searchsorted(matrix.ids_on_cpu, torch.tensor([ids.start, ids.stop])).tolist()
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
