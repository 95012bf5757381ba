"""Reductions of `LazyLogits` over the vocabulary, in one pass over the matrix: losses, log-probabilities, argmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pema_adapters.training.output.head_matrix import without_autocast
from pema_adapters.training.output.lazy_logits import LazyLogits
from pema_adapters.training.output.logit_statistics import compute_logit_statistics
from pema_adapters.training.output.transforms import AddBias


def _cross_entropy(  # noqa: PLR0913, PLR0917 - torch's signature
    lazy: LazyLogits, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    is_plain = weight is None and size_average is None and reduce is None and reduction in ("none", "mean", "sum")
    is_index = isinstance(target, Tensor) and target.dtype == torch.int64 and target.device == lazy.device
    if not (is_plain and is_index and lazy.dim() in (1, 2) and target.shape == lazy.shape[:-1]):
        return NotImplemented
    lazy.check_current()
    flat = target.reshape(-1)
    kept = (flat != ignore_index).nonzero().squeeze(-1)
    targets = flat[kept]
    _check_targets(targets, lazy.shape[-1])
    hidden = lazy.source.hidden.reshape(-1, lazy.source.hidden.shape[-1])
    hidden = hidden if len(kept) == len(flat) else hidden.index_select(0, kept)
    found = compute_logit_statistics(lazy.source.head, hidden, targets, mean=label_smoothing > 0)
    assert found.logsumexp is not None and found.target_logits is not None
    losses = found.logsumexp - (1 - label_smoothing) * found.target_logits
    if found.mean is not None:
        losses = losses - label_smoothing * found.mean
    if reduction == "none":
        losses = losses.new_zeros(len(flat)).index_copy(0, kept, losses).view(target.shape)
    else:
        losses = losses.sum() if reduction == "sum" else losses.mean()
    return losses.to(torch.float32 if torch.is_autocast_enabled(lazy.device.type) else lazy.dtype)


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocab_size:
            raise IndexError(f"Target {low if low < 0 else high} is out of bounds.")


def _is_last(lazy: LazyLogits, dim: Any) -> bool:
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, lazy.dim() - 1)


def _flat_hidden(lazy: LazyLogits) -> Tensor:
    lazy.check_current()
    return lazy.source.hidden.reshape(-1, lazy.source.hidden.shape[-1])


def _logsumexp(lazy: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if not _is_last(lazy, dim):
        return NotImplemented
    found = compute_logit_statistics(lazy.source.head, _flat_hidden(lazy)).logsumexp
    assert found is not None
    found = found.view(lazy.shape[:-1]).to(lazy.dtype)
    return found.unsqueeze(-1) if keepdim else found


def _gather(lazy: LazyLogits, dim: Any, index: Tensor, **kwargs: Any) -> Any:
    if kwargs or not _is_last(lazy, dim) or index.shape[:-1] != lazy.shape[:-1] or index.shape[-1] > 64:
        return NotImplemented
    count = index.shape[-1]
    hidden, targets = _flat_hidden(lazy).repeat_interleave(count, 0), index.reshape(-1)
    _check_targets(targets, lazy.shape[-1])
    found = compute_logit_statistics(lazy.source.head, hidden, targets, logsumexp=False).target_logits
    assert found is not None
    return found.view(index.shape).to(lazy.dtype)


@torch.no_grad()
def _argmax(lazy: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(lazy, dim):
        return NotImplemented
    found = _find_highest(lazy, 1)[1].view(lazy.shape[:-1])
    return found.unsqueeze(-1) if keepdim else found


def _topk(lazy: LazyLogits, k: int, dim: Any = -1, largest: bool = True, sorted: bool = True, **kwargs: Any) -> Any:
    needs_graph = torch.is_grad_enabled() and lazy.requires_grad
    if kwargs or needs_graph or not largest or not _is_last(lazy, dim) or not 0 < k <= 4096:
        return NotImplemented
    with torch.no_grad():
        values, ids = _find_highest(lazy, k)
    shape = (*lazy.shape[:-1], k)
    return torch.return_types.topk((values.view(shape), ids.view(shape)))


def _find_highest(lazy: LazyLogits, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest logits [N, k] of each token, and their token ids; of equal ones the first."""
    hidden = _flat_hidden(lazy)
    inputs = hidden.to(lazy.source.matrix.compute_dtype)
    values = inputs.new_full((len(inputs), 0), 0, dtype=lazy.dtype)
    ids = torch.empty(len(inputs), 0, dtype=torch.int64, device=inputs.device)
    with without_autocast(inputs.device):
        for first, product in lazy.source.matrix.iterate_products(inputs):
            last = first + product.shape[1]
            logits = _apply_parts(lazy, product, slice(first, last))
            columns = torch.arange(first, last, device=inputs.device).expand(len(inputs), -1)
            values, ids = _keep_highest(torch.cat([values, logits], dim=1), torch.cat([ids, columns], dim=1), k)
    return values, ids


def _keep_highest(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of logits [N, n] and their token ids; of equal ones argmax takes the first, as usual."""
    chosen = values.argmax(1, keepdim=True) if k == 1 else values.topk(min(k, values.shape[1]), dim=1).indices
    return values.gather(1, chosen), ids.gather(1, chosen)


def _apply_parts(lazy: LazyLogits, block: Tensor, columns: slice) -> Tensor:
    """Apply what follows the product to a block, rounding as the model does."""
    parts = lazy.source.parts
    if parts and isinstance(parts[0], AddBias):
        block, parts = block.add_(parts[0].bias.detach()[columns].to(block.dtype)), parts[1:]
    block = block.to(lazy.source.hidden.dtype)
    for part in parts:
        block = block + part.bias[columns].to(block.dtype) if isinstance(part, AddBias) else part.apply(block)
    return block


REDUCTIONS: dict[Any, Callable[..., Any]] = {
    functional.cross_entropy: _cross_entropy,
    torch.logsumexp: _logsumexp,
    Tensor.logsumexp: _logsumexp,
    torch.gather: _gather,
    Tensor.gather: _gather,
    torch.argmax: _argmax,
    Tensor.argmax: _argmax,
    torch.topk: _topk,
    Tensor.topk: _topk,
}
