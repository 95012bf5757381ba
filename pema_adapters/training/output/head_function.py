"""A head as a function of hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pema_adapters.training.output.head_matrix import HeadMatrix
from pema_adapters.training.output.transforms import AddBias, Transforms


@dataclass(frozen=True)
class Head:
    """A head as a function of hidden states: a product with a matrix [V, d], then transforms."""

    matrix: HeadMatrix
    transforms: Transforms

    @property
    def biases(self) -> list[Tensor]:
        """The biases [V] of the transforms."""
        return [part.bias for part in self.transforms.parts if isinstance(part, AddBias)]
