"""An ordinary checkpoint folder: which tensors it stores, where, and its rows read by memory map.

Safetensors or, where there are none, pickles (`.bin`); one file, or shards with an index.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError
from pema_adapters.formats.safetensors_header import DTYPE_BYTES, Header, as_float32, read_header
from pema_adapters.formats.shared_tensors import find_tied_names
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import canonicalize
from pema_adapters.formats.torch_pickle import read_pickle
from pema_adapters.io.input_file import Bytes, InputFile, RawBytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PYTORCH_METADATA = {"format": "pt"}
"""The metadata of a safetensors file that PyTorch wrote, without which Transformers refuses it."""
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
MAX_JSON = 100_000_000
"""Bytes of a JSON file that is parsed; the index of the largest checkpoints has some 20 MB."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises `FormatError` where it is missing or something else."""
    return parse_json(InputFile(path))


def parse_json(file: InputFile) -> dict[str, Any]:
    """The JSON object in `file`; raises `FormatError` where it is something else, or larger than MAX_JSON."""
    if file.size > MAX_JSON:
        raise FormatError(f"{file.path}: {file.size:,} bytes, expected JSON of at most {MAX_JSON:,}")
    return decode_json(file.read(0, file.size), file.path)


def decode_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `data`, the content of `path`; raises `FormatError` where it is something else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def is_plain_name(name: str) -> bool:
    """Whether a name is one of a file or folder right here, on every system."""
    return PurePath(name).name == name and name not in ("", "..") and not set(name) & set("\\/\0")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a checkpoint folder: `files` by name, and the index that lists them, if there is one."""

    files: tuple[Path, ...]
    index_file: InputFile | None
    index: dict[str, Any] | None
    is_pickled: bool


def find_weight_files(folder: Path) -> WeightFiles:
    """The weights that Transformers would load: safetensors before pickles, one file before shards.

    Reads nothing but the index. Raises `FormatError` where there are none, or where a shard is missing.
    """
    for single, index_name in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        is_pickled = single == PICKLE
        if (folder / single).exists():
            return WeightFiles((folder / single,), None, None, is_pickled)
        if (folder / index_name).exists():
            file = InputFile(folder / index_name)
            index = parse_json(file)
            return WeightFiles(_list_shards(file.path, index), file, index, is_pickled)
    raise FormatError(_explain_missing(folder))


def safetensors_name(name: str) -> str:
    """The safetensors file that holds what the weights file `name` holds.

    `output_name("pytorch_model-00001-of-00003.bin") == "model-00001-of-00003.safetensors"`
    """
    if name.endswith(".safetensors"):
        return name
    return PurePath(name.removeprefix("pytorch_") if name.startswith("pytorch_model") else name).stem + ".safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint. `tensors`: of all its files, in file order, then in the order of the file.

    index: the JSON of `index_file`, None for a single file. config: the JSON of `config_file`, {} without one.
    headers: of safetensors files. shared: names that a pickle has for a tensor kept under another name, and that
    Transformers ties again: `{dropped: kept}`; they are not in `tensors`.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    files: tuple[Path, ...]
    config: dict[str, Any]
    config_file: InputFile | None = None
    index: dict[str, Any] | None = None
    index_file: InputFile | None = None
    headers: dict[Path, Header] = field(default_factory=dict)
    is_pickled: bool = False
    shared: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Read the headers of all weights files; of pickles (which imports torch) the tables. Raises `FormatError`."""
        return cls.from_files(Path(folder), find_weight_files(Path(folder)))

    @classmethod
    def from_files(cls, folder: Path, found: WeightFiles) -> "Checkpoint":
        """The same, of weights files with any names."""
        config_file = InputFile(folder / CONFIG) if (folder / CONFIG).exists() else None
        config = {} if config_file is None else parse_json(config_file)
        contents = _read_pickles(found.files, config) if found.is_pickled else _read_safetensors(found.files)
        tensors = _merge_tensors(contents.tensors)
        if found.index_file is not None and found.index is not None:
            _check_index(found.index_file.path, found.index["weight_map"], tensors)
        return cls(
            folder=folder,
            tensors={name: tensor for name, tensor in tensors.items() if name not in contents.shared},
            files=found.files,
            config=config,
            config_file=config_file,
            index=found.index,
            index_file=found.index_file,
            headers=contents.headers,
            is_pickled=found.is_pickled,
            shared=contents.shared,
        )

    @cached_property
    def by_file(self) -> Mapping[Path, Sequence[StoredTensor]]:
        """The tensors of each weights file, in its order."""
        found: dict[Path, list[StoredTensor]] = defaultdict(list, {path: [] for path in self.files})
        for tensor in self.tensors.values():
            found[tensor.path].append(tensor)
        return MappingProxyType(dict(found))

    def metadata(self, path: Path) -> dict[str, str]:
        """What the header of a weights file says beside its tensors, or would say if it were safetensors."""
        return self.headers[path].metadata if path in self.headers else {**PYTORCH_METADATA}

    def safetensors_name(self, path: Path) -> str:
        """The name of the safetensors file that what the weights file `path` holds is written to."""
        return safetensors_name(path.name)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by stored name."""
        return MappingProxyType({name: tensor.shape for name, tensor in self.tensors.items()})

    def raw(self, name: str) -> RawBytes:
        """The bytes of a tensor, uint8 [nbytes]: a read-only view of the memory map, to be used at once."""
        return self.tensor(name).raw

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Bytes:
        """The bytes of a tensor from `begin` to `end`, in memory of their own; by default all."""
        return self.tensor(name).read(begin, end)

    def raw_rows(self, name: str, ids: np.ndarray) -> RawBytes:
        """The bytes of the rows `ids` (in [0, V)), uint8 [n, row_bytes], gathered into fresh memory."""
        shape = self.tensor(name).shape
        rows: RawBytes = self.raw(name).reshape(shape[0], -1)[ids]
        return rows

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """The rows `ids` (in [0, V)) as float32 [n, d]."""
        return as_float32(self.raw_rows(name, ids), self.tensor(name).dtype)

    def values(self, name: str, positions: np.ndarray) -> np.ndarray:
        """The values at flat `positions` as float32 [n]."""
        tensor = self.tensor(name)
        if tensor.dtype not in DTYPE_BYTES:
            raise FormatError(f"{tensor.path}: tensor {name!r}: cannot read values of dtype {tensor.dtype}")
        return as_float32(tensor.raw.reshape(-1, DTYPE_BYTES[tensor.dtype])[positions], tensor.dtype).reshape(-1)

    def tensor(self, name: str) -> StoredTensor:
        """Where the tensor lies; `FormatError` where there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(f"{self.folder}: no tensor {name!r} among its {len(self.tensors)}") from None

    def __deepcopy__(self, memo: object) -> "Checkpoint":
        return self


def _explain_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; expected a checkpoint with {SINGLE} or {INDEX}"
    broken = [folder / name for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX) if (folder / name).is_symlink()]
    if broken:  # a snapshot of the Hub's cache that was copied without its blobs, say
        found = f"is a link to {broken[0].readlink()}, which does not exist"
        return f"{broken[0]}: {found}; copy the folder with cp -rL, or fetch it again"
    return f"{folder}: neither {SINGLE} nor {INDEX}, nor {PICKLE} or {PICKLE_INDEX}; not a checkpoint folder"


def _list_shards(path: Path, index: dict[str, Any]) -> tuple[Path, ...]:
    """The files of the index `path`, sorted by name; each must be a plain name in its folder, and exist."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: no weight_map that names the shards")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise FormatError(f"{path}: tensor {tensor!r}: shard {name!r} is not a file name in this folder")
    files = tuple(path.parent / name for name in sorted(set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise FormatError(f"{file}: a shard that {path.name} names, but there is no such file; download it again")
    if len({safetensors_name(file.name) for file in files}) < len(files):
        raise FormatError(f"{path}: two of its shards would have the same name as safetensors; rename them")
    return files


@dataclass(frozen=True)
class _Contents:
    """What the weights files hold: tensors and headers by file, and names that share the tensor of another."""

    tensors: dict[Path, dict[str, StoredTensor]]
    headers: dict[Path, Header]
    shared: dict[str, str]


def _read_safetensors(files: tuple[Path, ...]) -> _Contents:
    headers = {path: read_header(path) for path in files}
    return _Contents({path: header.tensors for path, header in headers.items()}, headers, {})


def _read_pickles(files: tuple[Path, ...], config: dict[str, Any]) -> _Contents:
    ties_outputs = config.get("tie_word_embeddings", True) is not False
    found = {path: read_pickle(path) for path in files}
    shared: dict[str, str] = {}
    for tensors in found.values():
        shared |= find_tied_names(tensors.values(), ties_outputs)
    return _Contents(found, {}, shared)


def _merge_tensors(files: dict[Path, dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path, found in files.items():
        for name in found.keys() & tensors.keys():
            raise FormatError(f"{path}: tensor {name!r} is stored in {tensors[name].path.name} as well")
        tensors.update(found)
    for name, tensor in tensors.items():
        if (modern := canonicalize(name, "")) != name and modern in tensors:
            raise FormatError(
                f"{tensor.path}: tensor {name!r} is stored as {modern!r} as well; expected one of the two"
            )
    return tensors


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise FormatError(f"{path}: tensor {name!r} should be in {file}, but that file does not hold it")
