"""A tensor as it lies in a file: its bytes, in a memory map."""

import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pema_adapters.errors import reading
from pema_adapters.formats.safetensors_file import DTYPE_BYTES


@dataclass(frozen=True)
class Stored:
    """A tensor of the file `path`: `raw` are its bytes, uint8 [nbytes], little-endian, in order, read-only.

    start: their absolute offset in the file, so that they can be copied from there or mapped again. None where they
    do not lie there one after another (a transpose in a pickle); then `raw` is held in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    raw: np.ndarray = field(compare=False, repr=False)
    start: int | None = None

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return len(self.raw)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the tensor has a dtype of whole bytes and at least one dimension)."""
        return math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only, memory-mapped uint8 array."""
    with reading(path), path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
