"""The weights files of a checkpoint folder: which of them Transformers loads, and the tensors of each."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pema_adapters.errors import FormatError
from pema_adapters.formats.json_object import parse_json
from pema_adapters.formats.safetensors_header import read_header
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.torch_pickle import read_pickle
from pema_adapters.io.input_file import InputFile
from pema_adapters.io.safe_paths import is_plain_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The weights files of a checkpoint folder, sorted by name, and the index that lists them, if any."""

    files: tuple[Path, ...]
    index_file: InputFile | None
    index: dict[str, Any] | None
    is_pickled: bool


def find_weight_files(folder: Path) -> WeightFiles:
    """Find the weights that Transformers would load: safetensors before pickles, one file before shards.

    Reads only the index.

    Raises:
        FormatError: There are no weights, a shard is missing, or the index is damaged.
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
    """Return the name of the safetensors file that replaces the weights file `name`.

    `safetensors_name("pytorch_model-00001-of-00003.bin") == "model-00001-of-00003.safetensors"`
    """
    if name.endswith(".safetensors"):
        return name
    return PurePath(name.removeprefix("pytorch_") if name.startswith("pytorch_model") else name).stem + ".safetensors"


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read all tensors of a `.safetensors` file, or of a pickled `.bin` file (which imports torch), in file order."""
    return read_header(path).tensors if path.suffix == ".safetensors" else read_pickle(path)


def _explain_missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder; expected a checkpoint with {SINGLE} or {INDEX}"
    broken = [folder / name for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX) if (folder / name).is_symlink()]
    if broken:  # a snapshot of the Hub's cache that was copied without its blobs, say
        found = f"is a link to {broken[0].readlink()}, which does not exist"
        return f"{broken[0]}: {found}; copy the folder with cp -rL, or fetch it again"
    return f"{folder}: neither {SINGLE} nor {INDEX}, nor {PICKLE} or {PICKLE_INDEX}; not a checkpoint folder"


def _list_shards(path: Path, index: dict[str, Any]) -> tuple[Path, ...]:
    """Return the shards that the index `path` lists, sorted by name, after checking that each exists in its folder."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: no weight_map that lists the shards; fetch it again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise FormatError(f"{path}: tensor {tensor!r}: shard {name!r} is not a file name in this folder")
    files = tuple(path.parent / name for name in sorted(set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise FormatError(f"{file}: no such file, but {path.name} lists it as a shard; download it again")
    if len({safetensors_name(file.name) for file in files}) < len(files):
        raise FormatError(f"{path}: two of its shards would have the same name as safetensors; rename them")
    return files
