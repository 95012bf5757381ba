"""The rows that belong to one adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pema_adapters.training.embedding.row_table import RowTable


class PartialRows(RowTable):
    """The rows of one adapter; none until it has a vocabulary.

    Args:
        vocab_size: V.
        dim: d.
        device: of the rows: that of the matrix.
        dtype: of the rows.
        unseen: as in `PEMAConfig`.
        trainable: as in `PEMAConfig`. Rows that do not train equal the base's, so no state dict has them.
        grows: whether `PEMAConfig.vocabulary` is "grow".
    """

    token_ids: Tensor
    fingerprint: Tensor
    loads_piecewise = True  # from_pretrained hands over one tensor at a time

    def __init__(  # noqa: PLR0913, PLR0917 - what a table is, and what its config says
        self, vocab_size: int, dim: int, device: torch.device, dtype: torch.dtype, unseen: str, trainable: bool = True,
        grows: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vocab_size = vocab_size
        self.unseen, self.trainable, self.grows = unseen, trainable, grows
        self.weight = nn.Parameter(torch.empty(0, dim, device=device, dtype=dtype))
        self.register_buffer("token_ids", torch.empty(0, device=device, dtype=torch.int32))
        self.register_buffer("fingerprint", torch.empty(0, device=device, dtype=torch.uint8))
        self._invalidate_index()

    def __len__(self) -> int:
        return len(self.token_ids)

    def __bool__(self) -> bool:
        return True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.trainable:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.trainable:
            super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """Describe K of V, and d."""
        return f"{len(self):,} of {self.vocab_size:,} rows, {self.weight.shape[1]}"
