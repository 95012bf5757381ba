"""The matrix [V, d] of a language-model head, in blocks of rows: the base's, with trained rows in their places.

No block is copied further than one buffer, so that a pass over the matrix needs memory for `BLOCK_ROWS` rows wherever
the base's rows are: in a file, in host memory, or on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from pema_adapters.training.base.mapped_rows import MappedRows, slice_rows

BLOCK_ROWS = 4096
FEW_TOKENS = 64

BaseMatrix: TypeAlias = "MappedRows | Tensor"
"""The base's rows [V, d]: in a file, or in memory."""


@dataclass(frozen=True)
class HeadMatrix:
    """The matrix [V, d] that a head multiplies with, as it was when the head was called.

    Attributes:
        base: the base's rows [V, d].
        rows: the trained rows [K, d], in the graph; None if the head uses none.
        token_ids: int64 [K], strictly increasing, on the device of `rows`.
        ids_on_cpu: the same on the CPU, so that finding the rows of a block does not synchronise a GPU.
        dtype: the model's; rows of another dtype are rounded to it first, as in the full model.
        device: where blocks are used.
        version: of `rows` when the head was called.
    """

    base: BaseMatrix
    rows: Annotated[Tensor, "Float K d"] | None
    token_ids: Annotated[Tensor, "Int64 K"] | None
    ids_on_cpu: Annotated[Tensor, "Int64 K"] | None
    dtype: torch.dtype
    device: torch.device
    version: int = 0

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.base)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of blocks: float32 for a model in half precision, whose matrix products a CPU computes slowly."""
        return choose_compute_dtype(self.dtype)

    def detach(self) -> HeadMatrix:
        """Return the same with rows outside of the graph."""
        return replace(self, rows=None if self.rows is None else self.rows.detach())

    @torch.no_grad()
    def iterate_blocks(self) -> Iterator[tuple[int, Annotated[Tensor, "Float n d"]]]:
        """Yield the number of the first row and the rows [n, d] of each block, in `compute_dtype`.

        A block is valid until the next one is asked for: they share a buffer.
        """
        for first, block in _iterate_base(self.base, self.dtype, self.device):
            begin, end = self.find_trained(first, first + len(block))
            if begin < end:
                assert self.rows is not None and self.token_ids is not None
                trained = self.rows.detach()[begin:end].to(block.dtype)
                block.index_copy_(0, self.token_ids[begin:end] - first, trained)
            yield first, block

    @torch.no_grad()
    def iterate_products(
        self, inputs: Annotated[Tensor, "Float N d"]
    ) -> Iterator[tuple[int, Annotated[Tensor, "Float N n"]]]:
        """Yield the number of the first row and the product [N, n] of `inputs` [N, d] with the rows of each block.

        For a few tokens, as in generation, reading the rows costs most: they are not copied then, if the file holds
        them as they are used.
        """
        base, dtype = self.base, inputs.dtype
        if len(inputs) > FEW_TOKENS or isinstance(base, Tensor) or not base.dtype == self.dtype == dtype:
            for first, block in self.iterate_blocks():
                yield first, inputs @ block.t()
            return
        inputs = inputs.cpu()
        trained = None if self.rows is None else inputs @ self.rows.detach().to(inputs).t()
        for first in range(0, self.vocab_size, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, self.vocab_size)
            product = inputs @ base.map_or_read(first, last).t()
            begin, end = self.find_trained(first, last)
            if trained is not None and self.ids_on_cpu is not None and begin < end:
                product.index_copy_(1, self.ids_on_cpu[begin:end] - first, trained[:, begin:end])
            yield first, product.to(self.device)

    def find_trained(self, first: int, last: int) -> tuple[int, int]:
        """Return where the trained rows of the tokens from `first` to `last` begin and end among all K."""
        if self.ids_on_cpu is None:
            return 0, 0
        begin, end = torch.searchsorted(self.ids_on_cpu, torch.tensor([first, last])).tolist()
        return begin, end

    @torch.no_grad()
    def iterate_trained(self) -> Iterator[tuple[int, int, Annotated[Tensor, "Float n d"]]]:
        """Yield begin, end and `rows[begin:end]` of blocks of the trained rows, in `compute_dtype`."""
        if self.rows is not None:
            for begin in range(0, len(self.rows), BLOCK_ROWS):
                end = min(begin + BLOCK_ROWS, len(self.rows))
                yield begin, end, self.rows.detach()[begin:end].to(self.compute_dtype)

    def locate(self, token_ids: Annotated[Tensor, "Int64 n"]) -> tuple[Tensor, Tensor]:
        """Return the position [n] of each token among the trained rows, and whether it is there (bool [n])."""
        if self.token_ids is None or not len(self.token_ids):
            return torch.zeros_like(token_ids), torch.zeros_like(token_ids, dtype=torch.bool)
        positions = torch.searchsorted(self.token_ids, token_ids).clamp_(max=len(self.token_ids) - 1)
        return positions, self.token_ids[positions] == token_ids

    @torch.no_grad()
    def read_rows(self, token_ids: Annotated[Tensor, "Int64 n"]) -> Annotated[Tensor, "Float n d"]:
        """Return the rows [n, d] of `token_ids` [n], in `compute_dtype`, detached."""
        found = _read_base(self.base, token_ids).to(self.device, self.dtype).to(self.compute_dtype)
        if self.rows is None:
            return found
        positions, is_trained = self.locate(token_ids)
        trained = functional.embedding(positions, self.rows.detach()).to(found.dtype)
        return torch.where(is_trained.unsqueeze(-1), trained, found)


def without_autocast(device: torch.device) -> torch.autocast:
    """Compute in the dtypes of the operands inside the block; autocast would round blocks to half precision."""
    return torch.autocast(device.type, enabled=False)


def choose_compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which logits of a model of this dtype are computed."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _read_base(base: BaseMatrix, token_ids: Tensor) -> Tensor:
    if isinstance(base, Tensor):
        return base.detach()[token_ids.to(base.device)]
    unique, inverse = torch.unique(token_ids.cpu(), return_inverse=True)
    return base.read_rows(unique)[inverse]


def _iterate_base(base: BaseMatrix, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of the base's rows that may be written to."""
    compute_dtype = choose_compute_dtype(dtype)
    if not isinstance(base, Tensor) and base.dtype == dtype == compute_dtype and device.type == "cpu":
        yield from _number(base.iterate_buffered(BLOCK_ROWS))
        return
    buffer = torch.empty(min(BLOCK_ROWS, len(base)), base.shape[1], dtype=compute_dtype, device=device)
    for first, block in _number(_slice(base)):
        current = buffer[: len(block)]
        current.copy_(block if block.dtype == dtype else block.to(dtype))
        yield first, current


def _number(blocks: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield each block with the number of its first row."""
    first = 0
    for block in blocks:
        yield first, block
        first += len(block)


def _slice(base: BaseMatrix) -> Iterator[Tensor]:
    return slice_rows(base.detach(), BLOCK_ROWS) if isinstance(base, Tensor) else base.iterate_buffered(BLOCK_ROWS)
