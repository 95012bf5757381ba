"""The output embedding of a language model that shares the matrix E [V, d] with its input. Torch only.

Transformers ties it: one Parameter in two modules. Where the input keeps K rows of it, the output cannot do with K: a
softmax is over the whole vocabulary. So the head holds the base's E, frozen, without gradient or optimizer state, and

    tied    the K trained rows take the place of the base's in the output, too: what is tied stays tied
    full    the output stays the base's: input and output are two matrices from then on

The head becomes a `PartialOutput` in place, by its class, as the embedding does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pema_adapters.errors import SurgeryError
from pema_adapters.training.embedding import PartialEmbedding


class PartialOutput(nn.Linear):
    """An `nn.Linear` [V, d] whose weight is the input embedding's. Made by `convert_heads`, never constructed.

    While the matrix is let go, `weight` [V, d] is the base's, a buffer that is in no state.
    """

    _embedding: tuple[PartialEmbedding, ...]

    @property
    def embedding(self) -> PartialEmbedding:
        """The embedding whose matrix the head shares; in a tuple, for it is no submodule."""
        return self._embedding[0]

    @property
    def holds_base(self) -> bool:
        """Whether `weight` is a frozen matrix of its own."""
        return "weight" in self._buffers

    def forward(self, input: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., d]."""
        logits = super().forward(input)
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
            self.register_buffer("weight", matrix.detach(), persistent=False)

    def tie(self) -> None:
        """Share the embedding's weight, which is full again."""
        self._drop_weight()
        self.register_parameter("weight", self.embedding._parameters["weight"])

    def untie(self) -> None:
        """Have the base's matrix as a Parameter of its own."""
        matrix = self.weight.detach()
        if self.weight is self.embedding._parameters["weight"]:
            matrix = matrix.clone()
        self._drop_weight()
        self.register_parameter("weight", nn.Parameter(matrix))

    def _drop_weight(self) -> None:
        self._buffers.pop("weight", None)
        self._parameters.pop("weight", None)
        self._non_persistent_buffers_set.discard("weight")


def convert_heads(model: nn.Module, embedding: PartialEmbedding) -> dict[str, PartialOutput]:
    """Make every head of `model` that shares the matrix of `embedding` a `PartialOutput`; returns them by name.

    Raises:
        SurgeryError: something else than a linear layer shares it.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not _shares(module, embedding):
            continue
        if not isinstance(module, nn.Linear):
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
        del head.__dict__["_embedding"]
        head.__class__ = next(c for c in type(head).__mro__ if not issubclass(c, PartialOutput))  # type: ignore[assignment]


def _shares(module: nn.Module, embedding: nn.Embedding) -> bool:
    if isinstance(module, PartialOutput):
        return module.embedding is embedding
    return any(parameter is embedding.weight for parameter in module._parameters.values())


def _converted(head: nn.Linear, embedding: PartialEmbedding) -> PartialOutput:
    if not isinstance(head, PartialOutput):
        head.__class__ = _output_class(type(head))  # type: ignore[arg-type]
        converted: Any = head
        converted._embedding = (embedding,)
    return head  # type: ignore[return-value]


@cache
def _output_class(original: type[nn.Linear]) -> type[PartialOutput]:
    return (
        PartialOutput if original is nn.Linear else type(f"Partial{original.__name__}", (PartialOutput, original), {})
    )
