"""A checkpoint folder: its tensors, where each is stored, and rows and values of them, read by memory map.

The weights are safetensors or, if there are none, pickles (`.bin`); one file, or shards with an index.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError
from pema_adapters.formats.json_object import parse_json
from pema_adapters.formats.safetensors_header import DTYPE_BYTES, Header, as_float32, read_header
from pema_adapters.formats.shared_tensors import find_tied_names
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import canonicalize
from pema_adapters.formats.torch_pickle import read_pickle
from pema_adapters.formats.weights import WeightFiles, find_weight_files
from pema_adapters.io.input_file import Bytes, InputFile, RawBytes

CONFIG = "config.json"
PYTORCH_METADATA = {"format": "pt"}
"""The safetensors metadata that Transformers requires."""


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint.

    Attributes:
        tensors: All tensors by stored name, in the order of `files`, then of each file.
        files: The weights files.
        config: The JSON of `config_file`, {} if there is none.
        index: The JSON of `index_file`, None for a single weights file.
        headers: The headers of safetensors files.
        is_pickled: Whether the weights are pickles.
        shared: `{dropped: kept}` names of one tensor of a pickle that Transformers ties when it loads; the dropped
            ones are not in `tensors`.
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
        """Read and validate the headers of all weights files, or unpickle their tensors (which imports torch).

        Raises:
            FormatError: There are no weights, or a file is damaged.
        """
        return cls.from_files(Path(folder), find_weight_files(Path(folder)))

    @classmethod
    def from_files(cls, folder: Path, found: WeightFiles) -> "Checkpoint":
        """Do the same for weights files with any names."""
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
        """The tensors of each weights file, in the order of the file."""
        found: dict[Path, list[StoredTensor]] = defaultdict(list, {path: [] for path in self.files})
        for tensor in self.tensors.values():
            found[tensor.path].append(tensor)
        return MappingProxyType(dict(found))

    def metadata(self, path: Path) -> dict[str, str]:
        """Return the safetensors metadata of a weights file, or what the safetensors copy of a pickle will have."""
        return self.headers[path].metadata if path in self.headers else {**PYTORCH_METADATA}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor by stored name."""
        return MappingProxyType({name: tensor.shape for name, tensor in self.tensors.items()})

    def raw(self, name: str) -> RawBytes:
        """Return the bytes of a tensor as a read-only view of the memory map, uint8 [nbytes]; see `InputFile.view`."""
        return self.tensor(name).raw

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Bytes:
        """Read the bytes of a tensor from `begin` to `end` into memory; by default all."""
        return self.tensor(name).read(begin, end)

    def raw_rows(self, name: str, ids: np.ndarray) -> RawBytes:
        """Gather the bytes of the rows `ids` (n ids in [0, V)) into new memory, uint8 [n, row_bytes]."""
        shape = self.tensor(name).shape
        rows: RawBytes = self.raw(name).reshape(shape[0], -1)[ids]
        return rows

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Gather the rows `ids` (n ids in [0, V)) as float32 [n, d]."""
        return as_float32(self.raw_rows(name, ids), self.tensor(name).dtype)

    def values(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Gather the values at n flat `positions` as float32 [n]."""
        tensor = self.tensor(name)
        if tensor.dtype not in DTYPE_BYTES:
            raise FormatError(f"{tensor.path}: tensor {name!r}: cannot read values of dtype {tensor.dtype}")
        return as_float32(tensor.raw.reshape(-1, DTYPE_BYTES[tensor.dtype])[positions], tensor.dtype).reshape(-1)

    def tensor(self, name: str) -> StoredTensor:
        """Look up a tensor.

        Raises:
            FormatError: There is none of that name.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(f"{self.folder}: no tensor {name!r} among its {len(self.tensors)} tensors") from None

    def __deepcopy__(self, memo: object) -> "Checkpoint":
        return self


@dataclass(frozen=True)
class _Contents:
    """The tensors and headers of the weights files by file, and `shared` as in `Checkpoint`."""

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
