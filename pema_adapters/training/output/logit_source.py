"""What logits of a language-model head are computed from, and what happened to them since."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

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
    def ndim(self) -> int:
        """The number of dimensions of the logits."""
        return self.hidden.ndim

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        """Whether the logits depend on a tensor that needs a gradient."""
        return any(each.requires_grad for each in self.inputs)

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

    def check_current(self) -> None:
        """Refuse to compute logits from weights that have changed.

        Raises:
            SurgeryError: a row or a bias was changed in place since the head was called.
        """
        if not self.is_current:
            raise SurgeryError(
                "logits of a language model with PEMA are computed when they are looked at, and the trained weights "
                "have changed since the forward pass (optimizer.step(), say): read them before, or call the model again"
            )
