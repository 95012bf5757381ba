"""A tensor as it lies in a file."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pema_adapters.io.input_file import Bytes, InputFile, RawBytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: `nbytes` bytes, little-endian, in order, from the absolute offset `start`.

    start: None where the bytes do not lie one after another (a transpose in a pickle); then `held` has them in memory.
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
        """The file."""
        return self.source.path

    @property
    def raw(self) -> RawBytes:
        """All bytes, uint8 [nbytes], read-only, in the memory map of the file; to be used at once (see `view`)."""
        return self.view(0, self.nbytes) if self.buffer is None else self.buffer

    def view(self, begin: int, end: int) -> RawBytes:
        """The bytes from `begin` to `end` in the memory map, after a check that the file has not changed."""
        if self.buffer is not None or self.start is None:
            return self._require_buffer()[begin:end]
        return self.source.view(self.start + begin, self.start + end)

    def read(self, begin: int = 0, end: int | None = None) -> Bytes:
        """The same bytes in memory of their own; by default all."""
        end = self.nbytes if end is None else end
        if self.buffer is not None or self.start is None:
            return self._require_buffer().data[begin:end]
        return self.source.read(self.start + begin, self.start + end)

    def _require_buffer(self) -> RawBytes:
        return np.empty(0, np.uint8) if self.buffer is None else self.buffer
