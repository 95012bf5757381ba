"""Logits [..., V] of a language-model head that are computed when they are looked at, and only as far as they are.

A head returns `LazyLogits`: the hidden states, the matrix, and the elementwise functions applied so far. Shape changes
of the leading dimensions, casts, scales, tanh and biases give `LazyLogits` again; a cross entropy, an argmax and the
other functions in `lazy_functions.py` stream over the matrix; everything else gets real logits. No model is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from pema_adapters.training.output.lazy_functions import FUNCTIONS, METADATA
from pema_adapters.training.output.logit_source import Source


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
            self.source.check_current()
            self._real = self.source.compute()
        return self._real

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer queries of metadata, stream the functions that can be, and give all others real logits."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = FUNCTIONS.get(func)
        others = tree_leaves((args[1:], kwargs))
        if handler is not None and _is_lazy(args[:1]) and not any(isinstance(each, LazyLogits) for each in others):
            result = handler(args[0].source, *args[1:], **kwargs)
            if result is not NotImplemented:
                made = args[0] if result is args[0].source else tree_map_only(Source, make_lazy, result)
                return iter(made) if func is Tensor.__iter__ else made
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


def _is_lazy(first: Any) -> bool:
    return bool(first) and isinstance(first[0], LazyLogits) and not first[0].is_real


def _materialize(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyLogits) else value
