"""Log-sum-exp, target logits and mean of logits [N, V], and their gradients, without the logits.

The matrix of the head is read in blocks of rows. With the online softmax of flash attention (rows are its keys and its
values), one pass gives the log-sum-exp and its gradient with respect to the hidden states. Gradients of the K trained
rows need a second pass, over these rows alone; that of a bias [V], one over all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from pema_adapters.training.output.head_function import Head
from pema_adapters.training.output.head_matrix import without_autocast
from pema_adapters.training.output.second_pass import TOKEN_BLOCK, SecondPass, refuse_second_derivative
from pema_adapters.training.output.transforms import Transforms


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
        target_logits = at_target = None
        with without_autocast(hidden.device):
            if wanted.logsumexp or wanted.mean:
                for first, block in head.matrix.iterate_blocks():
                    totals.add(head.transforms, block, slice(first, first + len(block)))
            if targets is not None:
                target_logits, at_target = _compute_target_logits(head, inputs, targets)
        logsumexp, mean = totals.finish()
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
        grad_rows: Tensor | None = None
        grad_biases: list[Tensor | None] = [None] * len(ctx.head.biases)
        if needs_biases or ctx.needs_input_grad[1]:
            second = SecondPass(ctx.head, hidden.to(ctx.head.matrix.compute_dtype), targets, logsumexp, gradients)
            with without_autocast(hidden.device):
                grad_rows, grad_biases = second.run(with_rows=ctx.needs_input_grad[1], with_biases=needs_biases)
        return grad_hidden, grad_rows, None, None, None, *grad_biases


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
    logits, results = head.transforms.forward((hidden * rows).sum(-1), targets)
    slope = head.transforms.backward(torch.ones_like(logits), results)
    return logits, rows.mul_(slope.unsqueeze(-1))
