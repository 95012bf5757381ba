"""Logits [..., V] of a language-model head that are computed when they are looked at, and only as far as they are.

A head returns `LazyLogits`: the hidden states, the matrix, and the elementwise functions applied so far. Shape changes
of the leading dimensions, casts, scales, tanh and biases give `LazyLogits` again; a cross entropy, an argmax and the
other functions in `lazy_functions.py` stream over the matrix; everything else gets real logits. No model is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pema_adapters.errors import SurgeryError
from pema_adapters.training.output.head_function import Head
from pema_adapters.training.output.head_matrix import HeadMatrix
from pema_adapters.training.output.real_logits import compute_logits
from pema_adapters.training.output.transforms import AddBias, Cast, Transform, Transforms, read_version


@dataclass(frozen=True)
class Source:
    """What logits are computed from.

    Attributes:
        hidden: hidden states [..., d], in the graph.
        matrix: of the head.
        parts: what is applied to the product, in order; the first may be the head's own bias.
    """

    hidden: Annotated[Tensor, "Float *batch d"]
    matrix: HeadMatrix
    parts: tuple[Transform, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        casts = [part.dtype for part in self.parts if isinstance(part, Cast)]
        return casts[-1] if casts else self.hidden.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape [..., V] of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.matrix.vocab_size))

    @property
    def head(self) -> Head:
        """The head as a function of hidden states."""
        return Head(self.matrix, Transforms(self.parts))

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that may need a gradient."""
        biases = [part.bias for part in self.parts if isinstance(part, AddBias)]
        return [self.hidden, *([] if self.matrix.rows is None else [self.matrix.rows]), *biases]

    def with_part(self, part: Transform) -> Source:
        """Return the source of logits to which `part` is applied as well."""
        return replace(self, parts=(*self.parts, part))

    def detach(self) -> Source:
        """Return the same without the graph."""
        parts = (replace(part, bias=part.bias.detach()) if isinstance(part, AddBias) else part for part in self.parts)
        return Source(self.hidden.detach(), self.matrix.detach(), tuple(parts))

    @property
    def is_current(self) -> bool:
        """Whether the trained rows and the biases are as they were when the head was called."""
        rows, biases = self.matrix.rows, [part for part in self.parts if isinstance(part, AddBias)]
        return all(read_version(part.bias) == part.version for part in biases) and (
            rows is None or read_version(rows) == self.matrix.version
        )

    def compute(self) -> Tensor:
        """Return real logits, in the graph."""
        parts, bias = self.parts, None
        if parts and isinstance(parts[0], AddBias):
            bias, parts = parts[0].bias, parts[1:]
        logits = compute_logits(self.hidden, self.matrix, bias)
        for part in parts:
            logits = part.apply(logits)
        return logits


class LazyLogits(Tensor):
    """Logits [..., V] that are not in memory. Made by `make_lazy`, never constructed.

    Code that needs the values gets real logits, which are computed once and kept. Looking at them after a trained row
    or a bias was changed in place is an error, since the result would not be that of the forward pass.
    """

    source: Source
    _real: Tensor | None

    @property
    def is_real(self) -> bool:
        """Whether the logits have been computed."""
        return self._real is not None

    def materialize(self) -> Tensor:
        """Return the real logits.

        Raises:
            SurgeryError: what they are computed from has changed since the head was called.
        """
        if self._real is None:
            self.check_current()
            self._real = self.source.compute()
        return self._real

    def check_current(self) -> None:
        """Refuse to compute logits from weights that have changed.

        Raises:
            SurgeryError: a row or a bias was changed in place since the head was called.
        """
        if not self.source.is_current:
            raise SurgeryError(
                "logits of a language model with PEMA are computed when they are looked at, and the trained weights "
                "have changed since the forward pass (optimizer.step(), say): read them before, or call the model again"
            )

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer queries of metadata, stream the functions that can be, and give all others real logits."""
        from pema_adapters.training.output.lazy_functions import FUNCTIONS, METADATA

        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = FUNCTIONS.get(func)
        if handler is not None and args and isinstance(args[0], LazyLogits) and not args[0].is_real:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*tree_map(_materialize, args), **tree_map(_materialize, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Give real values to code below autograd."""
        with torch.no_grad():
            return func(*tree_map(_materialize, args), **tree_map(_materialize, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.materialize())


def make_lazy(source: Source) -> Tensor:
    """Return lazy logits, in the graph if an input is and a graph is built now."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in source.inputs):
        return _Wrap.apply(source, *source.inputs)  # type: ignore[no-any-return, no-untyped-call]
    return _wrap(source.detach())


class _Wrap(torch.autograd.Function):
    """Put lazy logits into the graph, for code that bypasses `__torch_function__`: an autograd function, say."""

    @staticmethod
    def forward(ctx: Any, source: Source, *inputs: Tensor) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(*inputs)
        return _wrap(source)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors is not None  # raises where an input was changed in place
        with torch.enable_grad():
            logits = ctx.source.compute()
        needed = [each for each in ctx.source.inputs if each.requires_grad]
        found = iter(torch.autograd.grad(logits, needed, gradient, allow_unused=True))
        return None, *(next(found) if each.requires_grad else None for each in ctx.source.inputs)


def _wrap(source: Source) -> LazyLogits:
    lazy = Tensor._make_wrapper_subclass(
        LazyLogits, source.shape, dtype=source.dtype, device=source.hidden.device, requires_grad=False
    )
    lazy.source, lazy._real = source, None
    return lazy


def _materialize(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyLogits) else value
