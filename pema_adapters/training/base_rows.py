"""The base rows of E [V, d], read where they lie: in the checkpoint on disk, or in a spill file.

Never all in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.formats.checkpoint import Tensor as StoredTensor

BLOCK_BYTES = 32 << 20

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class BaseRows:
    """Rows [V, d] of a matrix in a file, through a read-only memory map, followed by a few rows held in memory.

    The latter are rows that `resize_token_embeddings` added to the checkpoint's. A copy of the model shares this
    object: copying a memory map would copy the matrix.
    """

    def __init__(self, path: Path, start: int, shape: tuple[int, int], dtype: torch.dtype, tail: Tensor | None = None):
        self._path, self._start = path, start
        self.file_rows, self.dim = shape
        self.dtype = dtype
        self._tail = tail
        self._bytes = _map(path, start, self.file_rows, self.dim * dtype.itemsize)

    @classmethod
    def of(cls, tensor: StoredTensor, tail: Tensor | None = None) -> BaseRows:
        """The rows of a two-dimensional tensor in a file of weights, `tail` [n, d] after them."""
        rows, dim = tensor.shape
        assert tensor.start is not None
        return cls(tensor.path, tensor.start, (rows, dim), TORCH_DTYPES[tensor.dtype], tail)

    @classmethod
    def spill(cls, matrix: Tensor) -> BaseRows:
        """Write `matrix` [V, d] to an unnamed file in the temporary folder (TMPDIR), which goes with this object."""
        with _temporary_file(None) as (file, path):
            _write_blocks(file, blocks(matrix))
            return cls(path, 0, (matrix.shape[0], matrix.shape[1]), matrix.dtype)

    def __len__(self) -> int:
        return self.file_rows + (0 if self._tail is None else len(self._tail))

    def __deepcopy__(self, memo: object) -> BaseRows:
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise SurgeryError(
            "a shrunk model cannot be pickled whole, for its base rows lie in a file: "
            "use save_adapter, save_delta or save_pretrained"
        )

    def rows(self, token_ids: Tensor) -> Tensor:
        """The rows [n, d] of `token_ids` [n] (on the CPU, within [0, V)), in the dtype of the base, on the CPU."""
        if self._tail is None:
            return self._gather(token_ids)
        in_file = token_ids < self.file_rows
        found = torch.empty(len(token_ids), self.dim, dtype=self.dtype)
        found[in_file] = self._gather(token_ids[in_file])
        found[~in_file] = self._tail[token_ids[~in_file] - self.file_rows].to(self.dtype)
        return found

    def _gather(self, token_ids: Tensor) -> Tensor:
        """Rows of the file, copied once, into memory that torch allocates: they may become a Parameter."""
        found = torch.empty(len(token_ids), self.dim, dtype=self.dtype)
        raw = found.view(torch.uint8).numpy()
        np.take(self._bytes, token_ids.numpy(), axis=0, out=raw, mode="clip")  # "raise" would copy once more
        return found

    @property
    def block_rows(self) -> int:
        """How many rows make a block."""
        return _block_rows(self.dim, self.dtype)

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, a block [n, d] of at most 32 MiB at a time."""
        for first in range(0, self.file_rows, self.block_rows):
            yield self._typed(np.array(self._bytes[first : first + self.block_rows]))
        if self._tail is not None:
            yield self._tail.to(self.dtype)

    def lies_in(self, folder: Path) -> Path | None:
        """The file that holds the rows, if it is in `folder`: overwriting it in place would change the base."""
        if self._path.exists() and folder.exists() and self._path.parent.samefile(folder):
            return self._path
        return None

    def _typed(self, raw: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(raw).view(self.dtype)


def _block_rows(dim: int, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // max(1, dim * dtype.itemsize))


def blocks(matrix: Tensor, step: int | None = None) -> Iterator[Tensor]:
    """The rows of `matrix` [V, d] in order, on the CPU, `step` rows (or 32 MiB) at a time."""
    step = step or _block_rows(matrix.shape[1], matrix.dtype)
    for first in range(0, len(matrix), step):
        yield matrix[first : first + step].detach().cpu()


class MappedMatrix:
    """A matrix [V, d] in an unnamed file of `folder`: a tensor whose memory is the file, not the process's own.

    Used as a context manager: the tensor must not outlive it. Give `rows` in order, then write single ones.
    """

    def __init__(self, folder: Path, rows: Iterator[Tensor], shape: tuple[int, int], dtype: torch.dtype):
        with _temporary_file(folder) as (file, path):
            _write_blocks(file, (block.to(dtype) for block in rows))
            data = np.memmap(path, np.uint8, "r+", shape=(shape[0], shape[1] * dtype.itemsize))
        self.tensor = torch.from_numpy(data).view(dtype)

    def write(self, token_ids: Tensor, rows: Tensor) -> None:
        """Put `rows` [n, d] in the place of `token_ids` [n]."""
        self.tensor[token_ids.cpu().long()] = rows.detach().cpu().to(self.tensor.dtype)


class _temporary_file:
    """A file without a name once the block ends: nothing to clean up, whatever happens to the process."""

    def __init__(self, folder: Path | None):
        self._folder = folder

    def __enter__(self) -> tuple[Any, Path]:
        descriptor, name = tempfile.mkstemp(prefix=".pema-", dir=self._folder)
        self._file, self._path = os.fdopen(descriptor, "wb"), Path(name)
        return self._file, self._path

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _write_blocks(file: Any, rows: Iterator[Tensor]) -> None:
    for block in rows:
        file.write(block.contiguous().view(torch.uint8).numpy().data)
    file.flush()


def _map(path: Path, start: int, rows: int, row_bytes: int) -> np.ndarray[Any, Any]:
    if not rows * row_bytes:
        return np.empty((rows, row_bytes), np.uint8)
    return np.asarray(np.memmap(path, np.uint8, "r", offset=start, shape=(rows, row_bytes)))
