"""The output embedding of a language model that is tied to its input: both share the matrix E [V, d].

Transformers ties them as one Parameter in two modules. When the input keeps K rows, the output still needs all V, since
a softmax is over the whole vocabulary. So the head holds the base's E, frozen, without gradient or optimizer state, and

    tied    the K trained rows replace the base's in the output as well: what was tied stays tied
    full    the output keeps the base's matrix: input and output are two matrices from now on

The head becomes a `PartialOutput` in place, by a change of its class, as the embedding does. The base's E is not a
buffer of it, because DistributedDataParallel broadcasts buffers at every forward.

Losses that read the head's weight instead of calling the head (TRL's chunked loss, Liger, cut cross-entropy) would
train another function while trained rows are separate from the matrix. They get a `MetadataOnlyWeight`: it has a shape,
a dtype and a device, and refuses everything else.
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


class MetadataOnlyWeight(Tensor):
    """The base's matrix [V, d] as the weight of a head with trained rows elsewhere: only metadata can be read."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer queries of metadata.

        Raises:
            SurgeryError: the function would read or change values.
        """
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise SurgeryError(
            "the weight of a language-model head was used without calling the head: its trained rows are separate from "
            "this matrix, so a fused loss would train another function; have the head called (use_liger_kernel=False, "
            'SFTConfig(loss_type="nll") up to TRL 1.9, or transformers.Trainer), or use output_embeddings="full"'
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


class PartialOutput(nn.Linear):
    """An `nn.Linear` [V, d] that shares the input embedding's weight. Made by `convert_heads`, never constructed.

    While the embedding is shrunk, the head holds the base's matrix, frozen: neither a Parameter nor a buffer, and in no
    state dict.
    """

    _embedding: tuple[PartialEmbedding, ...]
    _base: Tensor | None

    @property
    def embedding(self) -> PartialEmbedding:
        """The embedding whose matrix the head shares; held in a tuple, because it is no submodule."""
        return self._embedding[0]

    @property
    def holds_base(self) -> bool:
        """Whether the head holds a frozen matrix of its own."""
        return self._base is not None

    @property
    def matrix(self) -> Tensor:
        """The matrix [V, d], without the trained rows that are separate from it."""
        matrix = self._parameters["weight"] if self._base is None else self._base
        assert matrix is not None
        return matrix

    def __getattr__(self, name: str) -> Any:
        """Return the matrix as `weight`; a `MetadataOnlyWeight` if other rows override some of it."""
        if name != "weight" or not ("weight" in self._parameters or self.holds_base):
            return super().__getattr__(name)
        has_rows = next(self.embedding.iterate_tied_rows(), None) is not None
        return self.matrix.detach().as_subclass(MetadataOnlyWeight) if has_rows else self.matrix

    def forward(self, input: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., d]."""
        if self._base is not None and self._base.device != input.device:
            self._base = self._base.to(
                input.device
            )  # the model was moved by code that sees Parameters and buffers only
        refuse_data_parallel(self)
        logits = functional.linear(input, self.matrix, self.bias)
        for rows in self.embedding.iterate_tied_rows():
            assert rows.token_ids is not None
            ids = rows.token_ids.long()
            bias = None if self.bias is None else self.bias[ids]
            trained = functional.linear(input, rows.weight.to(input.dtype), bias)
            logits = logits.index_copy(-1, ids, trained.to(logits.dtype))
        return logits

    def hold_base(self) -> None:
        """Keep the matrix as it is now, before the embedding releases it."""
        if not self.holds_base:
            matrix = self._parameters.pop("weight")
            assert matrix is not None
            self._base = matrix.detach()

    def tie(self) -> None:
        """Share the embedding's weight again, which is the full matrix."""
        self._drop_weight()
        self._parameters["weight"] = self.embedding._parameters["weight"]

    def untie(self) -> None:
        """Make the base's matrix a Parameter of the head."""
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
    """Convert every head of `model` that shares the matrix of `embedding`.

    Returns:
        The heads by name.

    Raises:
        SurgeryError: a module other than a linear layer shares the matrix.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not _shares_matrix(module, embedding):
            continue
        if not isinstance(module, PartialOutput) and type(module).forward is not nn.Linear.forward:
            raise SurgeryError(
                f"{name!r} ({type(module).__name__}) shares the matrix of the input embedding, and needs all "
                f"{embedding.num_embeddings} rows; expected torch.nn.Linear, so PEMA does not apply to "
                f"{type(model).__name__}"
            )
        found[name] = _convert(module, embedding)
    return found


def has_tied_head(model: nn.Module, embedding: nn.Embedding) -> bool:
    """Return whether a module other than an embedding shares the matrix."""
    return any(not isinstance(module, nn.Embedding) and _shares_matrix(module, embedding) for module in model.modules())


def find_heads(model: nn.Module, embedding: PartialEmbedding) -> dict[str, PartialOutput]:
    """Return the heads that `convert_heads` converted, by name."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: each for name, each in modules if isinstance(each, PartialOutput) and each.embedding is embedding}


def revert_heads(model: nn.Module, embedding: PartialEmbedding) -> None:
    """Undo `convert_heads`."""
    for head in find_heads(model, embedding).values():
        del head.__dict__["_embedding"], head.__dict__["_base"]
        head.__class__ = next(c for c in type(head).__mro__ if not issubclass(c, PartialOutput))  # type: ignore[assignment]


def _shares_matrix(module: nn.Module, embedding: nn.Embedding) -> bool:
    if isinstance(module, PartialOutput):
        return module.embedding is embedding
    return any(parameter is embedding.weight for parameter in module._parameters.values())


def _convert(head: nn.Linear, embedding: PartialEmbedding) -> PartialOutput:
    if not isinstance(head, PartialOutput):
        head.__class__ = _get_output_class(type(head))  # type: ignore[arg-type]
        converted: Any = head
        converted._embedding, converted._base = (embedding,), None
    return head  # type: ignore[return-value]


@cache
def _get_output_class(original: type[nn.Linear]) -> type[PartialOutput]:
    return (
        PartialOutput if original is nn.Linear else type(f"Partial{original.__name__}", (PartialOutput, original), {})
    )
