"""Shape changes of `LazyLogits`: one that leaves the last dimension alone applies to the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pema_adapters.training.output.logit_source import Source


def _reshape(source: Source, *shape: Any) -> Any:
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    vocab_size = source.shape[-1]
    if sizes[-1] == -1:
        leading = 1
        for size in sizes[:-1]:
            leading *= size
        sizes[-1] = source.shape.numel() // leading if leading else vocab_size
    if sizes[-1] != vocab_size or source.hidden.numel() == 0:
        return NotImplemented
    return replace(source, hidden=source.hidden.reshape(*sizes[:-1], source.hidden.shape[-1]))


def _view(source: Source, *shape: Any) -> Any:
    return _reshape(source, *shape)


def _index(source: Source, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    ellipses = sum(part is Ellipsis for part in parts)
    consumed = sum(_count_dimensions(part) for part in parts)
    if ellipses > 1 or consumed > source.ndim or not all(map(_is_index, parts)):
        return NotImplemented
    reaches_last = (consumed == source.ndim or ellipses == 1) and parts[-1] is not Ellipsis
    if reaches_last and not (isinstance(parts[-1], slice) and parts[-1] == slice(None)):
        return NotImplemented
    return replace(source, hidden=source.hidden[index])


def _is_index(part: Any) -> bool:
    return part is None or part is Ellipsis or (isinstance(part, int | slice | Tensor) and not isinstance(part, bool))


def _count_dimensions(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _iterate(source: Source) -> Any:
    if source.ndim < 2:
        return NotImplemented
    return [replace(source, hidden=hidden) for hidden in source.hidden.unbind(0)]


def _along(function: Callable[..., Any], position: int = 0, default: int | None = None) -> Callable[..., Any]:
    """Apply a function with a `dim` to the hidden states, unless it is the last one.

    Args:
        function: of torch, on a tensor.
        position: of `dim` among the arguments after the tensor.
        default: of `dim`.
    """

    def handle(source: Source, *args: Any, **kwargs: Any) -> Any:
        args = list(args)  # type: ignore[assignment]
        dim = kwargs["dim"] if "dim" in kwargs else args[position] if len(args) > position else default
        if not isinstance(dim, int):
            return NotImplemented
        dim = dim + source.ndim if dim < 0 else dim
        if not 0 <= dim < source.ndim - 1:
            return NotImplemented
        if "dim" in kwargs or len(args) <= position:
            kwargs["dim"] = dim
        else:
            args[position] = dim  # type: ignore[index]
        found = function(source.hidden, *args, **kwargs)
        if isinstance(found, Tensor):
            return replace(source, hidden=found)
        return tuple(replace(source, hidden=each) for each in found)

    return handle


def _unsqueeze(source: Source, dim: int) -> Any:
    dim = dim + source.ndim + 1 if dim < 0 else dim
    return replace(source, hidden=source.hidden.unsqueeze(dim)) if 0 <= dim < source.ndim else NotImplemented


def _flatten(source: Source, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = (dim + source.ndim if dim < 0 else dim for dim in (start_dim, end_dim))
    if not 0 <= start <= end < source.ndim - 1:
        return NotImplemented
    return replace(source, hidden=source.hidden.flatten(start, end))


def _transpose(source: Source, dim0: int, dim1: int) -> Any:
    first, second = (dim + source.ndim if dim < 0 else dim for dim in (dim0, dim1))
    if not (0 <= first < source.ndim - 1 and 0 <= second < source.ndim - 1):
        return NotImplemented
    return replace(source, hidden=source.hidden.transpose(first, second))


def _return_itself(source: Source, memory_format: Any = torch.contiguous_format) -> Any:
    return source if memory_format is torch.contiguous_format else NotImplemented


def _clone(source: Source, memory_format: Any = torch.preserve_format) -> Any:
    return replace(source)


def _detach(source: Source, *_: Any) -> Any:
    return source.detach()


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
