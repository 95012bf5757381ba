"""Elementwise functions of `LazyLogits` that lie between a head and its loss; they are applied block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pema_adapters.training.output.logit_source import Source
from pema_adapters.training.output.transforms import AddBias, Cast, Scale, Tanh


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def handle(source: Source, memory_format: Any = torch.preserve_format) -> Any:
        return source if source.dtype == dtype else source.with_part(Cast(dtype))

    return handle


def _to(source: Source, *args: Any, **kwargs: Any) -> Any:
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
    if kwargs or (device is not None and not _is_same_device(torch.device(device), source.device)):
        return NotImplemented
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    if dtype in (None, source.dtype):
        return replace(source) if copy else source
    return source.with_part(Cast(dtype))


def _is_same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index is None or one.index == other.index)


def _multiply(source: Source, other: Any, **kwargs: Any) -> Any:
    return _scale(source, other, kwargs, divides=False)


def _divide(source: Source, other: Any, **kwargs: Any) -> Any:
    return _scale(source, other, kwargs, divides=True)


def _scale(source: Source, other: Any, kwargs: dict[str, Any], divides: bool) -> Any:
    if kwargs or isinstance(other, bool) or not isinstance(other, int | float):
        return NotImplemented
    return source.with_part(Scale(other, divides))


def _tanh(source: Source) -> Any:
    return source.with_part(Tanh())


def _add(source: Source, other: Any, **kwargs: Any) -> Any:
    is_bias = isinstance(other, Tensor) and other.numel() == source.shape[-1]
    if kwargs or not is_bias or other.dim() > source.ndim or other.shape[-1:] != source.shape[-1:]:
        return NotImplemented
    if other.device != source.device or torch.promote_types(other.dtype, source.dtype) != source.dtype:
        return NotImplemented
    return source.with_part(AddBias.of(other.reshape(-1)))


ARITHMETIC: dict[Any, Callable[..., Any]] = {
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
}
