"""Matrices [V, d] in files: base rows, read from the checkpoint or a spill file, and scratch matrices for saving.

Neither is ever in memory as a whole.
"""

from __future__ import annotations

import ctypes
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
"""Names of weight files that save_pretrained writes."""

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class MappedRows:
    """The rows of a matrix [V, d]: those in a file, through a read-only memory map, then a few in memory.

    The latter were added to the checkpoint's by `resize_token_embeddings`. Copies of a model share this object, since
    copying a memory map would copy the matrix.

    The file stays open and may be renamed or unlinked. If its contents were changed or cut short, `read_rows` and
    `iterate_blocks` raise InputChangedError.

    Attributes:
        file_rows: number of rows in the file.
        dim: d.
        dtype: of the rows in the file, in which all rows are returned.
    """

    def __init__(self, file: InputFile, start: int, shape: tuple[int, int], dtype: torch.dtype):
        self._file, self._start = file.pin(), start
        self.file_rows, self.dim = shape
        self.dtype = dtype
        self._added: Tensor | None = None

    @classmethod
    def of(cls, tensor: StoredTensor) -> MappedRows:
        """Map the rows of a two-dimensional tensor in a weight file."""
        rows, dim = tensor.shape
        assert tensor.start is not None
        return cls(tensor.source, tensor.start, (rows, dim), TORCH_DTYPES[tensor.dtype])

    def with_added_rows(self, added: Tensor) -> MappedRows:
        """Return these rows followed by `added` [n, d]."""
        rows = MappedRows(self._file, self._start, (self.file_rows, self.dim), self.dtype)
        rows._added = added
        return rows

    @classmethod
    def spill(cls, matrix: Tensor) -> MappedRows:
        """Write `matrix` [V, d] to an unnamed file in the temporary folder (TMPDIR); it is deleted with this object."""
        with tempfile.TemporaryFile(prefix=".pema-") as file:
            _write_blocks(file, iterate_blocks(matrix))
            spilled = InputFile(Path(tempfile.gettempdir(), "spilled rows"), descriptor=os.dup(file.fileno()))
        return cls(spilled, 0, (matrix.shape[0], matrix.shape[1]), matrix.dtype)

    def __len__(self) -> int:
        return self.file_rows + (0 if self._added is None else len(self._added))

    def __deepcopy__(self, memo: object) -> MappedRows:
        return self

    def __getstate__(self) -> dict[str, Any]:
        raise SurgeryError(
            "a shrunk model cannot be pickled, because its base rows are in a file: "
            "use save_adapter, save_delta or save_pretrained"
        )

    def read_rows(self, token_ids: Tensor) -> Tensor:
        """Return the rows [n, d] of `token_ids` [n] (on the CPU, within [0, V)), in the base's dtype, on the CPU."""
        if self._added is None:
            return self._gather(token_ids)
        in_file = token_ids < self.file_rows
        found = torch.empty(len(token_ids), self.dim, dtype=self.dtype)
        found[in_file] = self._gather(token_ids[in_file])
        found[~in_file] = self._added[token_ids[~in_file] - self.file_rows].to(self.dtype)
        return found

    def _gather(self, token_ids: Tensor) -> Tensor:
        """Copy rows of the file, once, into memory that torch allocates: they may become a Parameter."""
        found = torch.empty(len(token_ids), self.dim, dtype=self.dtype)
        raw = found.view(torch.uint8).numpy()
        stored = self._file.view(self._offset_of(0), self._offset_of(self.file_rows), contents_only=True)
        stored = stored.reshape(self.file_rows, raw.shape[1])
        np.take(stored, token_ids.numpy(), axis=0, out=raw, mode="clip")  # "raise" would copy once more
        return found

    @property
    def rows_per_block(self) -> int:
        """Number of rows in a block."""
        return _count_rows_per_block(self.dim, self.dtype)

    def iterate_blocks(self) -> Iterator[Tensor]:
        """Yield all rows in order, in blocks [n, d] of at most 32 MiB."""
        for first in range(0, self.file_rows, self.rows_per_block):
            yield self._block(first, min(first + self.rows_per_block, self.file_rows))
        if self._added is not None:
            yield self._added.to(self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """V and d."""
        return len(self), self.dim

    def iterate_buffered(self, step: int) -> Iterator[Tensor]:
        """Yield all rows in order, in blocks [n, d] of at most `step` rows.

        A block is valid until the next one is asked for: they share a buffer.
        """
        buffer = torch.empty(min(step, max(self.file_rows, 1)), self.dim, dtype=self.dtype)
        for first in range(0, self.file_rows, step):
            block = buffer[: self.file_rows - first]
            self._file.read_into(self._offset_of(first), block.view(torch.uint8).numpy().data.cast("B"))
            yield block
        self.check()
        if self._added is not None:
            yield from slice_rows(self._added.to(self.dtype), step)

    def map_or_read(self, first: int, last: int) -> Tensor:
        """Return the rows from `first` to `last`, for one use at once.

        They are memory of the file itself if they are in the file, aligned to their dtype. Writing to them kills the
        process, since the map is read-only.
        """
        begin, end = self._offset_of(first), self._offset_of(last)
        if last > self.file_rows or begin % self.dtype.itemsize:
            return self.read_rows(torch.arange(first, last))
        stored = self._file.view(begin, end, contents_only=True)
        buffer = (ctypes.c_ubyte * len(stored)).from_address(stored.ctypes.data)  # torch warns of a read-only array
        rows = torch.frombuffer(buffer, dtype=torch.uint8).view(self.dtype).view(last - first, self.dim)
        rows._map = stored  # type: ignore[attr-defined] # it stays mapped as long as the rows are used
        return rows

    def check(self) -> None:
        """Raise InputChangedError if the contents of the file have changed."""
        self._file.check(contents_only=True)

    def find_in(self, folder: Path) -> Path | None:
        """Find the file of the rows among the weight files in `folder`, under any name or link.

        Returns:
            Its path; None if it is not there. Overwriting that file in place would change the base.
        """
        own, weights = self._file.path.name, folder.iterdir() if folder.is_dir() else ()
        found = (path for path in weights if path.name == own or WEIGHTS.fullmatch(path.name))
        return next((path for path in found if self._file.identity.is_same_file(path)), None)

    def _block(self, first: int, last: int) -> Tensor:
        """Read the rows from `first` to `last` with system calls: a file cut short is an error then, not SIGBUS."""
        raw = self._file.read(self._offset_of(first), self._offset_of(last))
        self.check()
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(self.dtype).view(last - first, self.dim)

    def _offset_of(self, row: int) -> int:
        """Return the offset of a row in the file."""
        return self._start + row * self.dim * self.dtype.itemsize


def _count_rows_per_block(dim: int, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // max(1, dim * dtype.itemsize))


def iterate_blocks(matrix: Tensor, step: int | None = None) -> Iterator[Tensor]:
    """Yield the rows of `matrix` [V, d] in order, on the CPU, `step` rows (default: 32 MiB) at a time."""
    step = step or _count_rows_per_block(matrix.shape[1], matrix.dtype)
    for block in slice_rows(matrix, step):
        yield block.detach().cpu()


def slice_rows(matrix: Tensor, step: int) -> Iterator[Tensor]:
    """Yield the rows of `matrix` [V, d] in order, `step` rows at a time, as views."""
    for first in range(0, len(matrix), step):
        yield matrix[first : first + step]


class ScratchMatrix:
    """A matrix [V, d] whose memory is an unnamed file in `folder`, so that saving it needs no memory of that size.

    Args:
        folder: where the file is created; it is deleted with the last reference to `tensor`.
        rows: all rows in order, in blocks [n, d].
        shape: V and d.
        dtype: of the matrix; the blocks are cast to it.

    Attributes:
        tensor: the matrix.
    """

    def __init__(self, folder: Path, rows: Iterator[Tensor], shape: tuple[int, int], dtype: torch.dtype):
        with tempfile.TemporaryFile(prefix=".pema-", dir=folder) as file:
            _write_blocks(file, (block.to(dtype) for block in rows))
            data = np.memmap(file, np.uint8, "r+", shape=(shape[0], shape[1] * dtype.itemsize))
        self.tensor = torch.from_numpy(data).view(dtype)

    def write(self, token_ids: Tensor, rows: Tensor) -> None:
        """Overwrite the rows of `token_ids` [n] with `rows` [n, d]."""
        self.tensor[token_ids.cpu().long()] = rows.detach().cpu().to(self.tensor.dtype)


def _write_blocks(file: Any, rows: Iterator[Tensor]) -> None:
    for block in rows:
        file.write(block.contiguous().view(torch.uint8).numpy().data)
    file.flush()
