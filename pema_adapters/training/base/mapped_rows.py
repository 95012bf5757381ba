"""The base rows of E [V, d], read where they lie: in the checkpoint on disk, or in a spill file.

Never all in memory.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.io.input_file import InputFile

BLOCK_BYTES = 32 << 20
WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)")
"""Files that save_pretrained writes."""

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

    The file is held open, and compared with what it was before each read: it may be renamed or unlinked, but where its
    contents were written to or cut short, `rows` and `blocks` raise InputChangedError.
    """

    def __init__(self, file: InputFile, start: int, shape: tuple[int, int], dtype: torch.dtype):
        self._file, self._start = file.pin(), start
        self.file_rows, self.dim = shape
        self.dtype = dtype
        self._tail: Tensor | None = None

    @classmethod
    def of(cls, tensor: StoredTensor) -> BaseRows:
        """The rows of a two-dimensional tensor in a file of weights."""
        rows, dim = tensor.shape
        assert tensor.start is not None
        return cls(tensor.source, tensor.start, (rows, dim), TORCH_DTYPES[tensor.dtype])

    def followed_by(self, tail: Tensor) -> BaseRows:
        """These rows and `tail` [n, d] after them."""
        rows = BaseRows(self._file, self._start, (self.file_rows, self.dim), self.dtype)
        rows._tail = tail
        return rows

    @classmethod
    def spill(cls, matrix: Tensor) -> BaseRows:
        """Write `matrix` [V, d] to an unnamed file in the temporary folder (TMPDIR), which goes with this object."""
        with tempfile.TemporaryFile(prefix=".pema-") as file:
            _write_blocks(file, blocks(matrix))
            spilled = InputFile(Path(tempfile.gettempdir(), "spilled rows"), descriptor=os.dup(file.fileno()))
        return cls(spilled, 0, (matrix.shape[0], matrix.shape[1]), matrix.dtype)

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
        stored = self._file.view(self._place(0), self._place(self.file_rows), contents_only=True)
        stored = stored.reshape(self.file_rows, raw.shape[1])
        np.take(stored, token_ids.numpy(), axis=0, out=raw, mode="clip")  # "raise" would copy once more
        return found

    @property
    def block_rows(self) -> int:
        """How many rows make a block."""
        return _block_rows(self.dim, self.dtype)

    def blocks(self) -> Iterator[Tensor]:
        """All rows in order, a block [n, d] of at most 32 MiB at a time."""
        for first in range(0, self.file_rows, self.block_rows):
            yield self._block(first, min(first + self.block_rows, self.file_rows))
        if self._tail is not None:
            yield self._tail.to(self.dtype)

    def check(self) -> None:
        """Raise InputChangedError if the rows are no longer what they were."""
        self._file.check(contents_only=True)

    def lies_in(self, folder: Path) -> Path | None:
        """The file that holds the rows, if it is one of the weights in `folder`, by whatever name or link.

        Overwriting it in place would change the base.
        """
        own, weights = self._file.path.name, folder.iterdir() if folder.is_dir() else ()
        found = (path for path in weights if path.name == own or WEIGHTS.fullmatch(path.name))
        return next((path for path in found if self._file.identity.is_same_file(path)), None)

    def _block(self, first: int, last: int) -> Tensor:
        """The rows from `first` to `last`, copied by the system: cutting the file meanwhile is an error, no SIGBUS."""
        raw = self._file.read(self._place(first), self._place(last))
        self.check()
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(self.dtype).view(last - first, self.dim)

    def _place(self, row: int) -> int:
        """Where in the file a row begins."""
        return self._start + row * self.dim * self.dtype.itemsize


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
        with tempfile.TemporaryFile(prefix=".pema-", dir=folder) as file:
            _write_blocks(file, (block.to(dtype) for block in rows))
            data = np.memmap(file, np.uint8, "r+", shape=(shape[0], shape[1] * dtype.itemsize))
        self.tensor = torch.from_numpy(data).view(dtype)

    def write(self, token_ids: Tensor, rows: Tensor) -> None:
        """Put `rows` [n, d] in the place of `token_ids` [n]."""
        self.tensor[token_ids.cpu().long()] = rows.detach().cpu().to(self.tensor.dtype)


def _write_blocks(file: Any, rows: Iterator[Tensor]) -> None:
    for block in rows:
        file.write(block.contiguous().view(torch.uint8).numpy().data)
    file.flush()
