"""Shape changes of `LazyLogits`: one that leaves the last dimension alone applies to the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pema_adapters.training.output.lazy_logits import LazyLogits, make_lazy


def _with_hidden(lazy: LazyLogits, hidden: Tensor) -> Tensor:
    return make_lazy(replace(lazy.source, hidden=hidden))


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


def _along(function: Callable[..., Any], position: int = 0, default: int | None = None) -> Callable[..., Any]:
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


SHAPES: dict[Any, Callable[..., Any]] = {
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
}
