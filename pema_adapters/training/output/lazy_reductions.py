"""Reductions of `LazyLogits` over the vocabulary, in one pass over the matrix: losses, log-probabilities, argmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pema_adapters.training.output.head_matrix import without_autocast
from pema_adapters.training.output.logit_source import Source
from pema_adapters.training.output.logit_statistics import compute_logit_statistics
from pema_adapters.training.output.transforms import AddBias


def _cross_entropy(  # noqa: PLR0913, PLR0917 - torch's signature
    source: Source, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    is_plain = weight is None and size_average is None and reduce is None and reduction in ("none", "mean", "sum")
    is_index = isinstance(target, Tensor) and target.dtype == torch.int64 and target.device == source.device
    if not (is_plain and is_index and source.ndim in (1, 2) and target.shape == source.shape[:-1]):
        return NotImplemented
    source.check_current()
    flat = target.reshape(-1)
    kept = (flat != ignore_index).nonzero().squeeze(-1)
    targets = flat[kept]
    _check_targets(targets, source.shape[-1])
    hidden = source.hidden.reshape(-1, source.hidden.shape[-1])
    hidden = hidden if len(kept) == len(flat) else hidden.index_select(0, kept)
    found = compute_logit_statistics(source.head, hidden, targets, mean=label_smoothing > 0)
    assert found.logsumexp is not None and found.target_logits is not None
    losses = found.logsumexp - (1 - label_smoothing) * found.target_logits
    if found.mean is not None:
        losses = losses - label_smoothing * found.mean
    if reduction == "none":
        losses = losses.new_zeros(len(flat)).index_copy(0, kept, losses).view(target.shape)
    else:
        losses = losses.sum() if reduction == "sum" else losses.mean()
    return losses.to(torch.float32 if torch.is_autocast_enabled(source.device.type) else source.dtype)


def _check_targets(targets: Tensor, vocab_size: int) -> None:
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocab_size:
            raise IndexError(f"Target {low if low < 0 else high} is out of bounds.")


def _is_last(source: Source, dim: Any) -> bool:
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, source.ndim - 1)


def _flat_hidden(source: Source) -> Tensor:
    source.check_current()
    return source.hidden.reshape(-1, source.hidden.shape[-1])


def _logsumexp(source: Source, dim: Any = None, keepdim: bool = False) -> Any:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if not _is_last(source, dim):
        return NotImplemented
    found = compute_logit_statistics(source.head, _flat_hidden(source)).logsumexp
    assert found is not None
    found = found.view(source.shape[:-1]).to(source.dtype)
    return found.unsqueeze(-1) if keepdim else found


def _gather(source: Source, dim: Any, index: Tensor, **kwargs: Any) -> Any:
    if kwargs or not _is_last(source, dim) or index.shape[:-1] != source.shape[:-1] or index.shape[-1] > 64:
        return NotImplemented
    count = index.shape[-1]
    hidden, targets = _flat_hidden(source).repeat_interleave(count, 0), index.reshape(-1)
    _check_targets(targets, source.shape[-1])
    found = compute_logit_statistics(source.head, hidden, targets, logsumexp=False).target_logits
    assert found is not None
    return found.view(index.shape).to(source.dtype)


@torch.no_grad()
def _argmax(source: Source, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(source, dim):
        return NotImplemented
    found = _find_highest(source, 1)[1].view(source.shape[:-1])
    return found.unsqueeze(-1) if keepdim else found


def _topk(source: Source, k: int, dim: Any = -1, largest: bool = True, sorted: bool = True, **kwargs: Any) -> Any:
    needs_graph = torch.is_grad_enabled() and source.requires_grad
    if kwargs or needs_graph or not largest or not _is_last(source, dim) or not 0 < k <= 4096:
        return NotImplemented
    with torch.no_grad():
        values, ids = _find_highest(source, k)
    shape = (*source.shape[:-1], k)
    return torch.return_types.topk((values.view(shape), ids.view(shape)))


def _find_highest(source: Source, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest logits [N, k] of each token, and their token ids; of equal ones the first."""
    hidden = _flat_hidden(source)
    inputs = hidden.to(source.matrix.compute_dtype)
    values = inputs.new_full((len(inputs), 0), 0, dtype=source.dtype)
    ids = torch.empty(len(inputs), 0, dtype=torch.int64, device=inputs.device)
    with without_autocast(inputs.device):
        for first, product in source.matrix.iterate_products(inputs):
            last = first + product.shape[1]
            logits = _apply_parts(source, product, slice(first, last))
            columns = torch.arange(first, last, device=inputs.device).expand(len(inputs), -1)
            values, ids = _keep_highest(torch.cat([values, logits], dim=1), torch.cat([ids, columns], dim=1), k)
    return values, ids


def _keep_highest(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k highest of logits [N, n] and their token ids; of equal ones argmax takes the first, as usual."""
    chosen = values.argmax(1, keepdim=True) if k == 1 else values.topk(min(k, values.shape[1]), dim=1).indices
    return values.gather(1, chosen), ids.gather(1, chosen)


def _apply_parts(source: Source, block: Tensor, columns: slice) -> Tensor:
    """Apply what follows the product to a block, rounding as the model does."""
    parts = source.parts
    if parts and isinstance(parts[0], AddBias):
        block, parts = block.add_(parts[0].bias.detach()[columns].to(block.dtype)), parts[1:]
    block = block.to(source.hidden.dtype)
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
