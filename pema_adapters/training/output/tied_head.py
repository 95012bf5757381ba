"""The output embedding of a language model that shares the matrix E [V, d] with its input. Torch only.

Transformers ties it: one Parameter in two modules. Where the input keeps K rows of it, the output cannot do with K: a
softmax is over the whole vocabulary. So the head holds the base's E, frozen, without gradient or optimizer state, and

    tied    the K trained rows take the place of the base's in the output, too: what is tied stays tied
    full    the output stays the base's: input and output are two matrices from then on

The head becomes a `PartialOutput` in place, by its class, as the embedding does. The base's E is no buffer of it, for
DistributedDataParallel broadcasts those at every forward.

Losses that take the weight of the head instead of calling it (TRL's chunked ones, Liger's, cut cross-entropy) would
train another function while rows lie apart from the matrix: the `weight` that they get then has a shape, a dtype and a
device, and refuses everything else (`ApartFromRows`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pema_adapters.errors import SurgeryError
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.embedding.row_table import refuse_data_parallel

_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad_fn", "layout", "nbytes",
                     "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")
    ),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.element_size, Tensor.is_floating_point,
    Tensor.__len__, Tensor.__hash__,
}  # fmt: skip


class ApartFromRows(Tensor):
    """The base's matrix [V, d] as the weight of a head whose trained rows are elsewhere: it describes itself alone."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what the matrix is like. Raises: SurgeryError for what would read or change its numbers."""
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise SurgeryError(
            "the weight of a language-model head was used without calling the head: its trained rows lie apart from "
            "this matrix, so a fused loss would train another function; have the head called (use_liger_kernel=False, "
            'SFTConfig(loss_type="nll") up to TRL 1.9, or transformers.Trainer), or use output_embeddings="full"'
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


class PartialOutput(nn.Linear):
    """An `nn.Linear` [V, d] whose weight is the input embedding's. Made by `convert_heads`, never constructed.

    While the matrix is let go, the head has the base's, frozen: no Parameter, no buffer, in no state.
    """

    _embedding: tuple[PartialEmbedding, ...]
    _base: Tensor | None

    @property
    def embedding(self) -> PartialEmbedding:
        """The embedding whose matrix the head shares; in a tuple, for it is no submodule."""
        return self._embedding[0]

    @property
    def holds_base(self) -> bool:
        """Whether the head has a frozen matrix of its own."""
        return self._base is not None

    @property
    def matrix(self) -> Tensor:
        """The matrix [V, d] without the rows that are trained apart from it."""
        matrix = self._parameters["weight"] if self._base is None else self._base
        assert matrix is not None
        return matrix

    def __getattr__(self, name: str) -> Any:
        """`weight` is the matrix, or stands for it where other rows take the place of some of it (`ApartFromRows`)."""
        if name != "weight" or not ("weight" in self._parameters or self.holds_base):
            return super().__getattr__(name)
        has_rows = next(self.embedding.tied_rows(), None) is not None
        return self.matrix.detach().as_subclass(ApartFromRows) if has_rows else self.matrix

    def forward(self, input: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., d]."""
        if self._base is not None and self._base.device != input.device:
            self._base = self._base.to(input.device)  # moved by something that knows Parameters and buffers alone
        refuse_data_parallel(self)
        logits = functional.linear(input, self.matrix, self.bias)
        for rows in self.embedding.tied_rows():
            assert rows.token_ids is not None
            ids = rows.token_ids.long()
            bias = None if self.bias is None else self.bias[ids]
            trained = functional.linear(input, rows.weight.to(input.dtype), bias)
            logits = logits.index_copy(-1, ids, trained.to(logits.dtype))
        return logits

    def hold_base(self) -> None:
        """Keep the matrix as it is now, when the embedding is about to let go of it."""
        if not self.holds_base:
            matrix = self._parameters.pop("weight")
            assert matrix is not None
            self._base = matrix.detach()

    def tie(self) -> None:
        """Share the embedding's weight, which is full again."""
        self._drop_weight()
        self._parameters["weight"] = self.embedding._parameters["weight"]

    def untie(self) -> None:
        """Have the base's matrix as a Parameter of its own."""
        matrix = self.matrix.detach()
        if matrix.data_ptr() == self.embedding._parameters["weight"].data_ptr():  # type: ignore[union-attr]
            matrix = matrix.clone()
        self._drop_weight()
        self._parameters["weight"] = nn.Parameter(matrix)

    def _drop_weight(self) -> None:
        self._base = None
        self._parameters.pop("weight", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialOutput:
        """Move and cast the base's matrix as a buffer would be."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._base is not None:
            self._base = fn(self._base)
        return self


def convert_heads(model: nn.Module, embedding: PartialEmbedding) -> dict[str, PartialOutput]:
    """Make every head of `model` that shares the matrix of `embedding` a `PartialOutput`; returns them by name.

    Raises:
        SurgeryError: something else than a linear layer shares it.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not _shares(module, embedding):
            continue
        if not isinstance(module, PartialOutput) and type(module).forward is not nn.Linear.forward:
            raise SurgeryError(
                f"{name!r} ({type(module).__name__}) shares the matrix of the input embedding, and needs all "
                f"{embedding.num_embeddings} rows; expected torch.nn.Linear, so PEMA does not apply to "
                f"{type(model).__name__}"
            )
        found[name] = _converted(module, embedding)
    return found


def has_tied_head(model: nn.Module, embedding: nn.Embedding) -> bool:
    """Whether anything but an embedding shares the matrix."""
    return any(not isinstance(module, nn.Embedding) and _shares(module, embedding) for module in model.modules())


def heads_of(model: nn.Module, embedding: PartialEmbedding) -> dict[str, PartialOutput]:
    """The heads that `convert_heads` found, by name."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        name: module for name, module in modules if isinstance(module, PartialOutput) and module.embedding is embedding
    }


def revert_heads(model: nn.Module, embedding: PartialEmbedding) -> None:
    """Undo `convert_heads`: the classes are as they were."""
    for head in heads_of(model, embedding).values():
        del head.__dict__["_embedding"], head.__dict__["_base"]
        head.__class__ = next(c for c in type(head).__mro__ if not issubclass(c, PartialOutput))  # type: ignore[assignment]


def _shares(module: nn.Module, embedding: nn.Embedding) -> bool:
    if isinstance(module, PartialOutput):
        return module.embedding is embedding
    return any(parameter is embedding.weight for parameter in module._parameters.values())


def _converted(head: nn.Linear, embedding: PartialEmbedding) -> PartialOutput:
    if not isinstance(head, PartialOutput):
        head.__class__ = _output_class(type(head))  # type: ignore[arg-type]
        converted: Any = head
        converted._embedding, converted._base = (embedding,), None
    return head  # type: ignore[return-value]


@cache
def _output_class(original: type[nn.Linear]) -> type[PartialOutput]:
    return (
        PartialOutput if original is nn.Linear else type(f"Partial{original.__name__}", (PartialOutput, original), {})
    )
