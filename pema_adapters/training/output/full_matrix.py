"""Load the full matrix E [V, d] with an adapter's rows written in (the paper's section 4, after training)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pema_adapters.training.base.base_model import BaseModel
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.embedding.partial_rows import PartialRows
from pema_adapters.training.output.tied_head import find_heads


def load_full_matrix(model: Any, owner: PartialEmbedding, rows: PartialRows | None) -> None:
    """Hold E [V, d] in memory, with the embedding's own rows and those of an adapter written in.

    A tied head shares the result. One that `output_embeddings="full"` untied keeps the base's matrix, as a Parameter.

    Args:
        model: changed in place.
        owner: its embedding, shrunk or not.
        rows: those of the adapter, if any.
    """
    heads, untied = find_heads(model, owner).values(), is_untied(model, rows)
    for head in heads if untied else ():
        head.untie(_read_base_matrix(owner))  # first: in a model that is not shrunk the matrix changes below
    matrix = _read_full_matrix(owner)
    if rows is not None:
        matrix[rows.token_ids.long()] = rows.weight.detach().to(matrix.dtype)
    owner.restore(matrix)
    for head in heads if not untied else ():
        head.tie()


def copy_base_rows(base: BaseModel, matrix: Tensor) -> None:
    """Fill `matrix` [V, d] with the base's rows, a block at a time."""
    first = 0
    for block in base.matrix.iterate_blocks():
        matrix[first : first + len(block)] = block.to(matrix.dtype)
        first += len(block)


def is_untied(model: Any, rows: PartialRows | None) -> bool:
    """Return whether the output has its own matrix once `rows` are written into the input's."""
    trains_input_only = rows is not None and rows.trainable and not rows.tied_to_output
    return model.config.tie_word_embeddings is False or trains_input_only


def _read_base_matrix(owner: PartialEmbedding) -> Tensor:
    """Return the base's E [V, d] as a tensor of its own."""
    weight = owner.weight.detach()
    if not isinstance(owner.base, BaseModel):
        return weight.clone()
    matrix = weight.new_empty(owner.num_embeddings, owner.embedding_dim)
    copy_base_rows(owner.base, matrix)
    return matrix


def _read_full_matrix(owner: PartialEmbedding) -> Tensor:
    """Return E [V, d] with own rows written in; the weight itself if the model is not shrunk."""
    if not isinstance(owner.base, BaseModel):
        return owner.weight.data
    matrix = _read_base_matrix(owner)
    if owner.token_ids is not None:
        matrix[owner.token_ids.long()] = owner.weight.detach()
    return matrix
