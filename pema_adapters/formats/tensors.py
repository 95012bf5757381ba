"""All tensors of one weights file, safetensors or pickle, as bytes in a memory map."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError
from pema_adapters.formats.checkpoint import Checkpoint, map_file
from pema_adapters.formats.safetensors_file import DTYPE_BYTES, read_header


@dataclass(frozen=True)
class Stored:
    """A tensor of the file `path`: `raw` are its bytes, uint8 [nbytes], read-only and memory-mapped."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    raw: np.ndarray

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the tensor has a dtype of whole bytes and at least one dimension)."""
        return math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]


def read_tensors(path: Path) -> dict[str, Stored]:
    """All tensors of a `.safetensors` file, or of a pickled `.bin` file (which imports torch), in file order."""
    if path.suffix == ".safetensors":
        found = read_header(path).tensors.values()
        data = map_file(path)
        return {t.name: Stored(t.name, t.dtype, t.shape, path, data[t.start : t.start + t.nbytes]) for t in found}
    return _read_pickle(path)


def checkpoint_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """All tensors of a checkpoint, whatever its sharding."""
    tensors = checkpoint.tensors.values()
    return {t.name: Stored(t.name, t.dtype, t.shape, t.path, checkpoint.raw(t.name)) for t in tensors}


def _read_pickle(path: Path) -> dict[str, Stored]:
    """Only tensors are unpickled: `weights_only`. Their bytes stay in the file: `mmap`."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # whatever an unpickler meets in a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{path}: not a file of tensors that torch can read safely ({reason[:200]})") from None
    if not isinstance(found, dict) or not all(isinstance(item, torch.Tensor) for item in found.values()):
        raise FormatError(f"{path}: expected a dictionary of tensors, found {type(found).__name__} with something else")
    return {str(name): _from_torch(str(name), tensor, path) for name, tensor in found.items()}


def _from_torch(name: str, tensor: Any, path: Path) -> Stored:
    import torch

    dtypes = {
        torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
        torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    }  # fmt: skip
    if tensor.dtype not in dtypes or tensor.is_sparse:
        raise FormatError(f"{path}: tensor {name!r}: {tensor.dtype} ({tensor.layout}) has no place in a checkpoint")
    flat = tensor.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy() if len(flat) else np.empty(0, np.uint8)
    return Stored(name, dtypes[tensor.dtype], tuple(tensor.shape), path, raw)
