"""A model's base: the rows of E [V, d] before training, and the fingerprint by which a merge recognizes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pema_adapters.formats.fingerprint import Fingerprint, digest_rows
from pema_adapters.training.base.mapped_rows import MappedRows

Digests = dict[str, tuple[tuple[int, ...], str]]
"""Tensor name: shape and digest."""


@dataclass(frozen=True)
class BaseModel:
    """What a model was before training.

    Attributes:
        matrix: the rows of E [V, d], on disk.
        fingerprint: the description of the base that artifacts contain; its row digest covers no row yet.
        newly_initialized: tensors of the base model that its checkpoint lacks, so that `from_pretrained` initialized
            them at random (BERT's pooler, say).
    """

    matrix: MappedRows
    fingerprint: Fingerprint
    newly_initialized: Digests = field(default_factory=dict)

    def read_rows(self, token_ids: Tensor) -> Tensor:
        """Return the base rows [n, d] of `token_ids` [n], on the CPU."""
        return self.matrix.read_rows(token_ids)

    def make_fingerprint(self, token_ids: Tensor, *, include_newly_initialized: bool, untied: str = "") -> Tensor:
        """Make the fingerprint of an artifact.

        Args:
            token_ids: the tokens [K] with a row in the artifact.
            include_newly_initialized: True for an adapter, which does not contain these tensors, so that only a base
                that has them will do; False for a full delta, which contains them.
            untied: name of the output matrix that is no longer tied to this one.

        Returns:
            The fingerprint as uint8 [n].
        """
        tensors = {**self.fingerprint.tensors, **(self.newly_initialized if include_newly_initialized else {})}
        return with_row_digest(replace(self.fingerprint, tensors=tensors, untied=untied), token_ids, self.read_rows)

    def __deepcopy__(self, memo: object) -> BaseModel:
        return self


def with_row_digest(fingerprint: Fingerprint, token_ids: Tensor, read_rows: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `fingerprint` with a digest of other rows of the same base.

    Args:
        fingerprint: of the base.
        token_ids: the tokens [K] whose base rows the digest covers; those above the base's V are left out.
        read_rows: gives base rows [n, d] for token ids [n].

    Returns:
        The fingerprint as uint8 [n].
    """
    ids = token_ids.cpu().numpy()
    in_base = ids[ids < fingerprint.base_vocab_size]
    digest = digest_rows(lambda some: to_float32(read_rows(torch.from_numpy(some))), in_base)
    return torch.from_numpy(replace(fingerprint, rows=digest).to_array().copy())


def to_float32(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as a float32 array."""
    return tensor.detach().cpu().float().numpy()
