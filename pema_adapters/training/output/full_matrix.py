"""The full matrix E [V, d] back in memory, with rows of an adapter written in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pema_adapters.training.base.find_base import Base
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.embedding.row_table import PartialRows
from pema_adapters.training.output.tied_head import heads_of


def load_full_matrix(model: Any, owner: PartialEmbedding, rows: PartialRows | None) -> None:
    """Hold E [V, d] in memory, with the embedding's own rows and those of an adapter written in.

    A tied head shares the result. One that `output_embeddings="full"` untied keeps the base's matrix, as a Parameter.
    """
    heads, untied = heads_of(model, owner).values(), is_untied(model, rows)
    matrix = _full_matrix(owner)
    for head in heads if untied else ():
        head.untie()  # first: in a model that is not shrunk it shares the matrix, which changes below
    if rows is not None:
        matrix[rows.token_ids.long()] = rows.weight.detach().to(matrix.dtype)
    owner.restore(matrix)
    for head in heads if not untied else ():
        head.tie()


def copy_base(base: Base, matrix: Tensor) -> None:
    """Fill `matrix` [V, d] with the base's rows, a block at a time."""
    first = 0
    for block in base.matrix.blocks():
        matrix[first : first + len(block)] = block.to(matrix.dtype)
        first += len(block)


def is_untied(model: Any, rows: PartialRows | None) -> bool:
    """Whether the output has a matrix of its own once `rows` are in the input's."""
    trains_input_alone = rows is not None and rows.trainable and not rows.ties_output
    return model.config.tie_word_embeddings is False or trains_input_alone


def _full_matrix(owner: PartialEmbedding) -> Tensor:
    """E [V, d] in memory, own rows written in; the weight itself where the model is not shrunk."""
    if not isinstance(owner.base, Base):
        return owner.weight.data
    weight = owner.weight
    matrix = torch.empty(owner.num_embeddings, owner.embedding_dim, dtype=weight.dtype, device=weight.device)
    copy_base(owner.base, matrix)
    if owner.token_ids is not None:
        matrix[owner.token_ids.long()] = weight.detach()
    return matrix
