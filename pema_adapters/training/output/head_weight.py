"""The weight of a language-model head as an attribute, for code that reads it instead of calling the head.

Fused and chunked losses (TRL, Liger) multiply hidden states with `lm_head.weight`. The matrix [V, d] is not in memory,
so they get a `HeadWeight`: its products with hidden states are `LazyLogits`, its rows can be read, and everything else
is refused, because it would need all of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from pema_adapters.errors import SurgeryError
from pema_adapters.training.output.head_matrix import HeadMatrix
from pema_adapters.training.output.lazy_functions import METADATA
from pema_adapters.training.output.lazy_logits import make_lazy
from pema_adapters.training.output.logit_source import Source
from pema_adapters.training.output.transforms import AddBias

Handler: TypeAlias = Callable[..., Any]


class HeadWeight(Tensor):
    """The matrix [V, d] of a head, or its transpose [d, V], without its values. Made by `make_weight`."""

    matrix: HeadMatrix
    is_transposed: bool

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer queries of metadata, and compute products with hidden states.

        Raises:
            SurgeryError: the function would need the whole matrix.
        """
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = FUNCTIONS.get(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        if result is NotImplemented:
            raise _refusal(getattr(func, "__name__", str(func)))
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse code below autograd, which has no use for metadata.

        Raises:
            SurgeryError: always, but for a `detach`, which autograd calls itself.
        """
        if func is torch.ops.aten.detach.default:
            return _wrap(args[0].matrix, args[0].is_transposed, args[0].dtype)
        raise _refusal(str(func))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


def make_weight(matrix: HeadMatrix, is_transposed: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight [V, d], or its transpose, in the graph if its rows are.

    Args:
        matrix: of the head.
        is_transposed: whether the weight is [d, V].
        dtype: of the weight; None for that of the matrix.
    """
    dtype = dtype or matrix.dtype
    if matrix.rows is not None and matrix.rows.requires_grad and torch.is_grad_enabled():
        return _Wrap.apply(matrix.rows, matrix, is_transposed, dtype)  # type: ignore[no-any-return, no-untyped-call]
    return _wrap(matrix, is_transposed, dtype)


class _Wrap(torch.autograd.Function):
    """Pass a gradient [V, d], which a loss with a backward of its own computes, on to the K trained rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: HeadMatrix, is_transposed: bool, dtype: torch.dtype) -> Tensor:
        ctx.token_ids, ctx.is_transposed, ctx.dtype = matrix.token_ids, is_transposed, rows.dtype
        return _wrap(matrix, is_transposed, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradient.t() if ctx.is_transposed else gradient
        return gradient[ctx.token_ids].to(ctx.dtype), None, None, None


def _wrap(matrix: HeadMatrix, is_transposed: bool, dtype: torch.dtype) -> HeadWeight:
    shape = tuple(matrix.base.shape)[:: -1 if is_transposed else 1]
    weight = Tensor._make_wrapper_subclass(HeadWeight, shape, dtype=dtype, device=matrix.device)
    weight.matrix, weight.is_transposed = matrix, is_transposed
    return weight


def _refusal(name: str) -> SurgeryError:
    return SurgeryError(
        f"the weight of a language-model head was used in {name!r}, which needs the whole matrix; it is not in memory, "
        "and its trained rows are separate from it: have the head called (use_liger_kernel=False, or "
        "transformers.Trainer), or call restore_embeddings(model) first"
    )


def _multiply(hidden: Tensor, weight: HeadWeight, bias: Tensor | None) -> Tensor:
    base = weight.matrix.base
    if isinstance(base, Tensor) and base.requires_grad and torch.is_grad_enabled():
        raise _refusal("linear")  # the base trains as a whole, beside rows of an adapter
    parts = () if bias is None else (AddBias.of(bias),)
    return make_lazy(Source(hidden, weight.matrix, parts))


def _linear(hidden: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, HeadWeight) or isinstance(hidden, HeadWeight) or weight.is_transposed:
        return NotImplemented
    return _multiply(hidden, weight, bias)


def _matmul(hidden: Any, weight: Any) -> Any:
    if not isinstance(weight, HeadWeight) or isinstance(hidden, HeadWeight) or not weight.is_transposed:
        return NotImplemented
    return _multiply(hidden, weight, None)


def _transpose(weight: HeadWeight, dim0: int = 0, dim1: int = 1) -> Any:
    if {dim0 % 2, dim1 % 2} != {0, 1}:
        return weight
    return make_weight(weight.matrix, not weight.is_transposed, weight.dtype)


def _get_transposed(weight: HeadWeight, *_: Any) -> Any:
    return _transpose(weight)


def _detach(weight: HeadWeight, *_: Any) -> Any:
    return make_weight(weight.matrix.detach(), weight.is_transposed, weight.dtype)


def _to_float32(weight: HeadWeight, *_: Any, **__: Any) -> Any:
    return _cast(weight, torch.float32)


def _cast(weight: HeadWeight, dtype: torch.dtype) -> Any:
    """Cast to the dtype in which products are computed anyway; another one would round rows, or be no more exact."""
    if dtype == weight.dtype:
        return weight
    if dtype != weight.matrix.compute_dtype:
        return NotImplemented
    return make_weight(weight.matrix, weight.is_transposed, dtype)


def _to(weight: HeadWeight, *args: Any, **kwargs: Any) -> Any:
    """Accept a cast, and a device that the weight is on already."""
    wanted = {*args, *kwargs.values()} - {True, False, None, weight.dtype, weight.device, weight.device.type}
    if not wanted:
        return NotImplemented if kwargs.get("copy") else weight
    (dtype, *others) = wanted
    return _cast(weight, dtype) if isinstance(dtype, torch.dtype) and not others else NotImplemented


def _return_itself(weight: HeadWeight, *_: Any, **__: Any) -> Any:
    return weight


def _read_rows(weight: HeadWeight, index: Any) -> Any:
    """Read rows by a slice, a list or a tensor of token ids, in the graph."""
    if weight.is_transposed or not isinstance(index, slice | list | Tensor):
        return NotImplemented
    matrix = weight.matrix
    if isinstance(index, Tensor) and index.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    ids = torch.arange(matrix.vocab_size)[index] if not isinstance(index, Tensor) else index
    flat = ids.reshape(-1).long().to(matrix.device)
    found = matrix.read_rows(flat).to(weight.dtype)
    if matrix.rows is not None:
        positions, is_trained = matrix.locate(flat)
        trained = functional.embedding(positions, matrix.rows).to(weight.dtype)
        found = torch.where(is_trained.unsqueeze(-1), trained, found)
    return found.view(*ids.shape, found.shape[-1])


FUNCTIONS: dict[Any, Handler] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.t: _transpose,
    torch.t: _transpose,
    Tensor.T.__get__: _get_transposed,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _get_transposed,  # type: ignore[attr-defined]
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.detach: _detach,
    torch.detach: _detach,
    Tensor.to: _to,
    Tensor.float: _to_float32,
    Tensor.contiguous: _return_itself,
    Tensor.__getitem__: _read_rows,
}
"""Handlers of the functions that need no more than products with the matrix, or some of its rows."""
