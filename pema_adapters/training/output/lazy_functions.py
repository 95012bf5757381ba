"""The functions of torch that `LazyLogits` answer without computing all logits.

`FUNCTIONS` maps a function to a handler with its arguments, whose first is a `LazyLogits`. A handler returns
NotImplemented where its arguments need real logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from pema_adapters.training.output.lazy_logits import LazyLogits, make_lazy
from pema_adapters.training.output.logit_statistics import compute_logit_statistics
from pema_adapters.training.output.transforms import AddBias, Cast, Scale, Tanh

Handler: TypeAlias = Callable[..., Any]

METADATA: set[Any] = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad_fn", "layout",
                     "itemsize", "nbytes", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested")
    ),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.ndimension,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference, Tensor.get_device, Tensor.__len__,
    Tensor.__hash__, torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference,
}  # fmt: skip
"""Functions that read no values."""


def _with_hidden(lazy: LazyLogits, hidden: Tensor) -> Tensor:
    return make_lazy(replace(lazy.source, hidden=hidden))


# -- shapes: what leaves the last dimension alone applies to the hidden states


def _reshape(lazy: LazyLogits, *shape: Any) -> Any:
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    vocab_size = lazy.shape[-1]
    if sizes[-1] == -1:
        leading = 1
        for size in sizes[:-1]:
            leading *= size
        sizes[-1] = lazy.numel() // leading if leading else vocab_size
    if sizes[-1] != vocab_size or lazy.source.hidden.numel() == 0:
        return NotImplemented
    return _with_hidden(lazy, lazy.source.hidden.reshape(*sizes[:-1], lazy.source.hidden.shape[-1]))


def _view(lazy: LazyLogits, *shape: Any) -> Any:
    return _reshape(lazy, *shape)


def _index(lazy: LazyLogits, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    ellipses = sum(part is Ellipsis for part in parts)
    consumed = sum(_count_dimensions(part) for part in parts)
    if ellipses > 1 or consumed > lazy.dim() or not all(map(_is_index, parts)):
        return NotImplemented
    reaches_last = (consumed == lazy.dim() or ellipses == 1) and parts[-1] is not Ellipsis
    if reaches_last and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        return NotImplemented
    return _with_hidden(lazy, lazy.source.hidden[index])


def _is_index(part: Any) -> bool:
    if isinstance(part, Tensor):
        return not isinstance(part, LazyLogits)
    return part is None or part is Ellipsis or (isinstance(part, int | slice) and not isinstance(part, bool))


def _count_dimensions(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _iterate(lazy: LazyLogits) -> Any:
    if lazy.dim() < 2:
        return NotImplemented
    return iter([_with_hidden(lazy, hidden) for hidden in lazy.source.hidden.unbind(0)])


def _along(function: Handler, position: int = 0, default: int | None = None) -> Handler:
    """Apply a function with a `dim` to the hidden states, unless it is the last one.

    Args:
        function: of torch, on a tensor.
        position: of `dim` among the arguments after the tensor.
        default: of `dim`.
    """

    def handle(lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        args = list(args)  # type: ignore[assignment]
        dim = kwargs["dim"] if "dim" in kwargs else args[position] if len(args) > position else default
        if not isinstance(dim, int):
            return NotImplemented
        dim = dim + lazy.dim() if dim < 0 else dim
        if not 0 <= dim < lazy.dim() - 1:
            return NotImplemented
        if "dim" in kwargs or len(args) <= position:
            kwargs["dim"] = dim
        else:
            args[position] = dim  # type: ignore[index]
        found = function(lazy.source.hidden, *args, **kwargs)
        if isinstance(found, Tensor):
            return _with_hidden(lazy, found)
        return tuple(_with_hidden(lazy, each) for each in found)

    return handle


def _unsqueeze(lazy: LazyLogits, dim: int) -> Any:
    dim = dim + lazy.dim() + 1 if dim < 0 else dim
    return _with_hidden(lazy, lazy.source.hidden.unsqueeze(dim)) if 0 <= dim < lazy.dim() else NotImplemented


def _flatten(lazy: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = (dim + lazy.dim() if dim < 0 else dim for dim in (start_dim, end_dim))
    if not 0 <= start <= end < lazy.dim() - 1:
        return NotImplemented
    return _with_hidden(lazy, lazy.source.hidden.flatten(start, end))


def _transpose(lazy: LazyLogits, dim0: int, dim1: int) -> Any:
    first, second = (dim + lazy.dim() if dim < 0 else dim for dim in (dim0, dim1))
    if not (0 <= first < lazy.dim() - 1 and 0 <= second < lazy.dim() - 1):
        return NotImplemented
    return _with_hidden(lazy, lazy.source.hidden.transpose(first, second))


def _return_itself(lazy: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    return lazy if memory_format is torch.contiguous_format else NotImplemented


def _clone(lazy: LazyLogits, memory_format: Any = torch.preserve_format) -> Any:
    return make_lazy(lazy.source)


def _detach(lazy: LazyLogits, *_: Any) -> Any:
    return make_lazy(lazy.source.detach())


# -- elementwise functions


def _cast(dtype: torch.dtype) -> Handler:
    def handle(lazy: LazyLogits, memory_format: Any = torch.preserve_format) -> Any:
        return lazy if lazy.dtype == dtype else make_lazy(lazy.source.with_part(Cast(dtype)))

    return handle


def _to(lazy: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    kwargs = dict(kwargs)
    copy = kwargs.pop("copy", False)
    kwargs.pop("non_blocking", None)
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, torch.device | str | int) and not isinstance(arg, bool):
            device = arg
        elif isinstance(arg, Tensor):
            dtype, device = arg.dtype, arg.device
        elif isinstance(arg, bool):
            continue
        else:
            return NotImplemented
    if kwargs or (device is not None and not _is_same_device(torch.device(device), lazy.device)):
        return NotImplemented
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    if dtype in (None, lazy.dtype):
        return make_lazy(lazy.source) if copy else lazy
    return make_lazy(lazy.source.with_part(Cast(dtype)))


def _is_same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index is None or one.index == other.index)


def _multiply(lazy: LazyLogits, other: Any, **kwargs: Any) -> Any:
    return _scale(lazy, other, kwargs, divides=False)


def _divide(lazy: LazyLogits, other: Any, **kwargs: Any) -> Any:
    return _scale(lazy, other, kwargs, divides=True)


def _scale(lazy: LazyLogits, other: Any, kwargs: dict[str, Any], divides: bool) -> Any:
    if kwargs or isinstance(other, bool) or not isinstance(other, int | float):
        return NotImplemented
    return make_lazy(lazy.source.with_part(Scale(other, divides)))


def _tanh(lazy: LazyLogits) -> Any:
    return make_lazy(lazy.source.with_part(Tanh()))


def _add(lazy: LazyLogits, other: Any, **kwargs: Any) -> Any:
    is_bias = isinstance(other, Tensor) and not isinstance(other, LazyLogits) and other.numel() == lazy.shape[-1]
    if kwargs or not is_bias or other.dim() > lazy.dim() or other.shape[-1:] != lazy.shape[-1:]:
        return NotImplemented
    if other.device != lazy.device or torch.promote_types(other.dtype, lazy.dtype) != lazy.dtype:
        return NotImplemented
    return make_lazy(lazy.source.with_part(AddBias.of(other.reshape(-1))))


# -- reductions over the vocabulary


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
        return losses.new_zeros(len(flat)).index_copy(0, kept, losses).view(target.shape).to(lazy.dtype)
    return (losses.sum() if reduction == "sum" else losses.mean()).to(lazy.dtype)


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
    for first, block in lazy.source.matrix.iterate_blocks():
        logits = _apply_parts(lazy, (inputs @ block.t()), slice(first, first + len(block)))
        values = torch.cat([values, logits], dim=1)
        columns = torch.arange(first, first + len(block), device=inputs.device).expand(len(inputs), -1)
        ids = torch.cat([ids, columns], dim=1)
        is_single = k == 1  # of equal logits, argmax takes the first, as the full model's does
        chosen = values.argmax(1, keepdim=True) if is_single else values.topk(min(k, values.shape[1]), dim=1).indices
        values, ids = values.gather(1, chosen), ids.gather(1, chosen)
    return values, ids


def _apply_parts(lazy: LazyLogits, block: Tensor, columns: slice) -> Tensor:
    """Apply what follows the product to a block, rounding as the model does."""
    parts = lazy.source.parts
    if parts and isinstance(parts[0], AddBias):
        block, parts = block.add_(parts[0].bias.detach()[columns].to(block.dtype)), parts[1:]
    block = block.to(lazy.source.hidden.dtype)
    for part in parts:
        block = block + part.bias[columns].to(block.dtype) if isinstance(part, AddBias) else part.apply(block)
    return block


FUNCTIONS: dict[Any, Handler] = {
    Tensor.view: _view,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.__getitem__: _index,
    Tensor.__iter__: _iterate,
    Tensor.contiguous: _return_itself,
    Tensor.clone: _clone,
    torch.clone: _clone,
    Tensor.detach: _detach,
    torch.detach: _detach,
    Tensor.data.__get__: _detach,  # type: ignore[attr-defined]
    Tensor.unsqueeze: _unsqueeze,
    torch.unsqueeze: _unsqueeze,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.unbind: _along(torch.unbind, default=0),
    torch.unbind: _along(torch.unbind, default=0),
    Tensor.squeeze: _along(torch.squeeze),
    torch.squeeze: _along(torch.squeeze),
    Tensor.select: _along(torch.select),
    torch.select: _along(torch.select),
    Tensor.narrow: _along(torch.narrow),
    torch.narrow: _along(torch.narrow),
    Tensor.index_select: _along(torch.index_select),
    torch.index_select: _along(torch.index_select),
    Tensor.split: _along(torch.split, 1, 0),
    torch.split: _along(torch.split, 1, 0),
    Tensor.chunk: _along(torch.chunk, 1, 0),
    torch.chunk: _along(torch.chunk, 1, 0),
    Tensor.to: _to,
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.half: _cast(torch.float16),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.mul: _multiply,
    torch.mul: _multiply,
    torch.multiply: _multiply,
    Tensor.multiply: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    Tensor.div: _divide,
    torch.div: _divide,
    Tensor.true_divide: _divide,
    torch.true_divide: _divide,
    Tensor.divide: _divide,
    torch.divide: _divide,
    Tensor.__truediv__: _divide,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    Tensor.add: _add,
    torch.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
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
