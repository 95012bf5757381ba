"""Elementwise functions between a head's matrix product and its loss: casts, scales, soft-capping, biases.

Each is applied to logits in two ways: to a tensor [..., V] in the graph, exactly as the model would (`apply`), and to a
block [n, B] of logits of some tokens outside of the graph (`forward`, `backward`), where no [n, V] exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from torch import Tensor

Block = Annotated[Tensor, "Float n B"]


class Transform(Protocol):
    """An elementwise function of logits."""

    def apply(self, logits: Annotated[Tensor, "Float *batch V"]) -> Annotated[Tensor, "Float *batch V"]:
        """Return the function of logits [..., V], in the graph."""

    def forward(self, block: Block, token_ids: Tensor | slice) -> Block:
        """Return the function of a block; `token_ids` are those of its columns. May overwrite the block."""

    def backward(self, gradient: Block, result: Block) -> Block:
        """Return the gradient of the function's input, given its result. May overwrite the gradient."""


@dataclass(frozen=True)
class Cast:
    """A cast; blocks stay in the dtype that they are computed in, which is at least as precise."""

    dtype: torch.dtype

    def apply(self, logits: Tensor) -> Tensor:
        """See `Transform`."""
        return logits.to(self.dtype)

    def forward(self, block: Block, token_ids: Tensor | slice) -> Block:
        """See `Transform`."""
        return block

    def backward(self, gradient: Block, result: Block) -> Block:
        """See `Transform`."""
        return gradient


@dataclass(frozen=True)
class Scale:
    """A product with a number; with `divides`, a quotient, which rounds differently."""

    factor: float
    divides: bool = False

    def apply(self, logits: Tensor) -> Tensor:
        """See `Transform`."""
        return logits / self.factor if self.divides else logits * self.factor

    def forward(self, block: Block, token_ids: Tensor | slice) -> Block:
        """See `Transform`."""
        return block.div_(self.factor) if self.divides else block.mul_(self.factor)

    def backward(self, gradient: Block, result: Block) -> Block:
        """See `Transform`."""
        return gradient.div_(self.factor) if self.divides else gradient.mul_(self.factor)


@dataclass(frozen=True)
class Tanh:
    """The hyperbolic tangent, of soft-capping."""

    def apply(self, logits: Tensor) -> Tensor:
        """See `Transform`."""
        return torch.tanh(logits)

    def forward(self, block: Block, token_ids: Tensor | slice) -> Block:
        """See `Transform`."""
        return torch.tanh(block)

    def backward(self, gradient: Block, result: Block) -> Block:
        """See `Transform`."""
        return gradient.mul_(1 - result * result)


@dataclass(frozen=True)
class AddBias:
    """A sum with a bias [V].

    Attributes:
        bias: [V], in the graph.
        version: of the bias when it was added.
    """

    bias: Annotated[Tensor, "Float V"]
    version: int

    @classmethod
    def of(cls, bias: Tensor) -> AddBias:
        """Add `bias` [V] as it is now."""
        return cls(bias, read_version(bias))

    def apply(self, logits: Tensor) -> Tensor:
        """See `Transform`."""
        return logits + self.bias.to(logits.dtype)

    def forward(self, block: Block, token_ids: Tensor | slice) -> Block:
        """See `Transform`."""
        return block.add_(self.bias.detach()[token_ids].to(block.dtype))

    def backward(self, gradient: Block, result: Block) -> Block:
        """See `Transform`."""
        return gradient


def read_version(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place; 0 for one that torch does not count this for."""
    return 0 if tensor.is_inference() else tensor._version


class Transforms:
    """A composition of transforms, for blocks of logits.

    Args:
        parts: in the order in which they are applied.
    """

    def __init__(self, parts: Sequence[Transform]) -> None:
        self.parts = [part for part in parts if not isinstance(part, Cast)]
        self._keeps_results = any(isinstance(part, Tanh) for part in parts)
        self.are_constant_shifts = all(isinstance(part, AddBias) for part in self.parts)

    def forward(self, block: Block, token_ids: Tensor | slice) -> tuple[Block, list[Tensor]]:
        """Return the transformed block, and what `backward` needs. Overwrites the block."""
        results = []
        for part in self.parts:
            block = part.forward(block, token_ids)
            if isinstance(part, Tanh):
                block, kept = block.clone(), block
                results.append(kept)
        return block, results

    def backward(self, gradient: Block, results: list[Tensor], at_bias: dict[int, Tensor] | None = None) -> Block:
        """Return the gradient of the matrix product. Overwrites the gradient.

        Args:
            gradient: of the transformed block.
            results: as `forward` returned them.
            at_bias: is filled with the sum over tokens [B] of the gradient at each `AddBias`, by its index in `parts`.
        """
        results = list(results)
        for number in reversed(range(len(self.parts))):
            part = self.parts[number]
            if isinstance(part, AddBias) and at_bias is not None:
                at_bias[number] = gradient.sum(0)
            gradient = part.backward(gradient, results.pop() if isinstance(part, Tanh) else gradient)
        return gradient
