"""An ordinary checkpoint folder: which tensors it stores, where, and its rows read by memory map."""

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError
from pema_adapters.formats.safetensors_file import DTYPE_BYTES, TensorInfo, as_float32, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def canonical(name: str, prefix: str) -> str:
    """The name by which a tensor is matched in any layout: no base-model prefix, today's spelling.

    `canonical("bert.embeddings.LayerNorm.gamma", "bert") == "embeddings.LayerNorm.weight"`
    """
    if prefix:
        name = name.removeprefix(prefix + ".")
    for old, new in _LEGACY.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def match(names: Iterable[str], prefix: str) -> dict[str, str]:
    """`{canonical name: stored name}`. Of a name stored in both ways, the prefixed one counts."""
    found: dict[str, str] = {}
    for name in names:
        key = canonical(name, prefix)
        if key not in found or name.startswith(prefix + "."):
            found[key] = name
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises `FormatError` where it is missing or something else."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def is_plain_name(name: str) -> bool:
    """Whether a name is one of a file or folder right here, on every system."""
    return PurePath(name).name == name and name not in ("", "..") and not set(name) & set("\\/\0")


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only, memory-mapped uint8 array."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint. `tensors`: of all its files, in file order, then offset order.

    Rows are read through one read-only memory map per file, opened when first needed and never copied.
    """

    folder: Path
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    metadata: dict[Path, dict[str, str]]
    index: dict[str, Any] | None
    config: dict[str, Any]
    _maps: dict[Path, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Read the headers of `model.safetensors`, or of the shards in the index. Raises `FormatError`."""
        folder = Path(folder)
        index = None if (folder / SINGLE).exists() or not (folder / INDEX).exists() else read_json(folder / INDEX)
        files = (folder / SINGLE,) if index is None else _shards(folder, index)
        if index is None and not files[0].exists():
            raise FormatError(_nothing_in(folder))
        headers = {path: read_header(path) for path in files}
        tensors = _collect({path: header.tensors for path, header in headers.items()})
        if index is not None:
            _check_index(folder / INDEX, index["weight_map"], tensors)
        config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
        metadata = {path: header.metadata for path, header in headers.items()}
        return cls(folder, tensors, files, metadata, index, config)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by stored name."""
        return MappingProxyType({name: tensor.shape for name, tensor in self.tensors.items()})

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 [nbytes]: a read-only view of the memory map."""
        tensor = self.tensor(name)
        if tensor.path not in self._maps:
            self._maps[tensor.path] = map_file(tensor.path)
        return self._maps[tensor.path][tensor.start : tensor.start + tensor.nbytes]

    def raw_rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """The bytes of the rows `ids` (in [0, V)), uint8 [n, row_bytes], gathered into fresh memory."""
        shape = self.tensor(name).shape
        rows: np.ndarray = self.raw(name).reshape(shape[0], -1)[ids]
        return rows

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """The rows `ids` (in [0, V)) as float32 [n, d]."""
        return as_float32(self.raw_rows(name, ids), self.tensor(name).dtype)

    def values(self, name: str, positions: np.ndarray) -> np.ndarray:
        """The values at flat `positions` as float32 [n]."""
        dtype = self.tensor(name).dtype
        if dtype not in DTYPE_BYTES:
            raise FormatError(f"{self.tensor(name).path}: tensor {name!r}: cannot read values of dtype {dtype}")
        return as_float32(self.raw(name).reshape(-1, DTYPE_BYTES[dtype])[positions], dtype).reshape(-1)

    def tensor(self, name: str) -> TensorInfo:
        """Where the tensor lies; `FormatError` where there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(f"{self.folder}: no tensor {name!r} among its {len(self.tensors)}") from None

    def __deepcopy__(self, memo: object) -> "Checkpoint":  # copying a memory map would read the file into memory
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Checkpoint.open, (self.folder,)


def _nothing_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; expected a checkpoint with {SINGLE} or {INDEX}"
    for name in _PICKLES:
        if (folder / name).exists():
            return (
                f"{folder / name}: a pickled checkpoint, which cannot be read yet; expected {SINGLE}: "
                "load it once and call save_pretrained(folder) to write safetensors"
            )
    return f"{folder}: neither {SINGLE} nor {INDEX}; not a checkpoint folder"


def _shards(folder: Path, index: dict[str, Any]) -> tuple[Path, ...]:
    """The files of the index, sorted by name; each must be a plain name in the folder, and exist."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{folder / INDEX}: no weight_map that names the shards")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise FormatError(f"{folder / INDEX}: tensor {tensor!r}: shard {name!r} is not a file name in this folder")
    files = tuple(folder / name for name in sorted(set(weight_map.values())))
    for path in files:
        if not path.is_file():
            raise FormatError(f"{path}: a shard that {INDEX} names, but there is no such file; download it again")
    return files


def _collect(files: dict[Path, dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path, found in files.items():
        for name in found.keys() & tensors.keys():
            raise FormatError(f"{path}: tensor {name!r} is stored in {tensors[name].path.name} as well")
        tensors.update(found)
    return tensors


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise FormatError(f"{path}: tensor {name!r} should be in {file}, but that file does not hold it")
