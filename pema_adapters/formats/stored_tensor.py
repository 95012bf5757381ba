"""A tensor in a file: name, dtype, shape, and where its bytes are."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pema_adapters.io.input_file import Bytes, InputFile, RawBytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, little-endian, in row-major order.

    Attributes:
        name: Its name in the file.
        dtype: Its dtype as safetensors spells it, "BF16" for example.
        shape: Its shape.
        source: The file.
        start: The absolute offset of its first byte; None if it is not contiguous (a transpose in a pickle).
        nbytes: Its size in bytes.
        buffer: Its bytes in memory, uint8 [nbytes], if `start` is None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: InputFile
    start: int | None
    nbytes: int
    buffer: RawBytes | None = field(default=None, compare=False, repr=False)

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.source.path

    @property
    def raw(self) -> RawBytes:
        """All bytes as a read-only view of the memory map, uint8 [nbytes]; see `InputFile.view`."""
        return self.view(0, self.nbytes) if self.buffer is None else self.buffer

    def view(self, begin: int, end: int) -> RawBytes:
        """Return the bytes from `begin` to `end` as a view of the memory map; see `InputFile.view`."""
        if self.buffer is not None or self.start is None:
            return self._require_buffer()[begin:end]
        return self.source.view(self.start + begin, self.start + end)

    def read(self, begin: int = 0, end: int | None = None) -> Bytes:
        """Read the bytes from `begin` to `end` into memory; by default all."""
        end = self.nbytes if end is None else end
        if self.buffer is not None or self.start is None:
            return self._require_buffer().data[begin:end]
        return self.source.read(self.start + begin, self.start + end)

    def _require_buffer(self) -> RawBytes:
        return np.empty(0, np.uint8) if self.buffer is None else self.buffer
