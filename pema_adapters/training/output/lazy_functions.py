"""The functions of torch that `LazyLogits` answer without computing all logits.

`FUNCTIONS` maps a function to a handler, which gets the function's arguments, the `Source` of the logits in their
place. It returns the source of other logits, or several, or a result; NotImplemented if it needs real logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pema_adapters.training.output.lazy_arithmetic import ARITHMETIC
from pema_adapters.training.output.lazy_reductions import REDUCTIONS
from pema_adapters.training.output.lazy_shapes import SHAPES

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

FUNCTIONS: dict[Any, Callable[..., Any]] = {**SHAPES, **ARITHMETIC, **REDUCTIONS}
