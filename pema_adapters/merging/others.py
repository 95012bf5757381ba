"""The files of the output that are not its weights: what is carried over, and what stays an adapter."""

import json
import os
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.artifact import HEAD_CONFIG, Delta
from pema_adapters.formats.checkpoint import CONFIG, INDEX, is_plain_name
from pema_adapters.formats.find import ADAPTER_CONFIG, MARKER
from pema_adapters.formats.safetensors_file import encode_header
from pema_adapters.formats.stored import Stored
from pema_adapters.io.input_file import InputFile
from pema_adapters.merging.plan import PlannedFile
from pema_adapters.merging.segments import Copy, Literal, joined, stored_bytes
from pema_adapters.merging.settings import json_file

WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".ggml",
    ".tflite", ".pb", ".npz", ".mlmodel", ".pkl", ".lock", ".incomplete",
}  # fmt: skip
LONGEST_NAME = 255
"""Bytes that the name of a file or folder may have on every usual file system."""
MODULES = "modules.json"
ADAPTERS = "adapters"
INTERFACE = "adapter_interface.json"


def carried_files(folder: Path) -> list[PlannedFile]:
    """Tokenizer, generation configuration, README and other small files of the base, copied as they are.

    Weights in any format are left behind, and folders too, but for the modules of a Sentence Transformers model.
    """
    top = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_carried(path)]
    below = [path for module in _modules(folder) for path in sorted(module.rglob("*")) if path.is_file()]
    return [_copied(path, folder) for path in top + below]


def _is_carried(path: Path) -> bool:
    name = path.name
    own = {CONFIG, INDEX, MARKER, ADAPTER_CONFIG, HEAD_CONFIG, "trainer_state.json"}
    return not (name.startswith(".") or path.suffix in WEIGHTS or name.endswith(".index.json") or name in own)


def _modules(folder: Path) -> list[Path]:
    return [folder / name for name in module_paths(folder / MODULES) if (folder / name).is_dir()]


def module_paths(path: Path) -> list[str]:
    """The folders that modules.json names; [] where it is something else."""
    if not path.is_file():
        return []
    try:
        names = [str(module["path"]) for module in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return [name for name in dict.fromkeys(names) if is_plain_name(name)]


def _copied(path: Path, folder: Path) -> PlannedFile:
    return PlannedFile(path.relative_to(folder).as_posix(), joined([Copy.whole(InputFile(path))]))


def left_files(delta: Delta) -> list[PlannedFile]:
    """What cannot go into weights yet: `adapters/NAME`, an artifact without PEMA, ready for `load_adapter`."""
    if delta.kind == "full":
        return []
    folder = f"{ADAPTERS}/{_safe(delta)}"
    files = []
    if delta.rest.config is not None:
        files.append(json_file(f"{folder}/{ADAPTER_CONFIG}", delta.rest.config))
        files.append(weights_file(f"{folder}/adapter.safetensors", delta.rest.tensors))
    if delta.head is not None and not delta.head.is_static:
        files.append(json_file(f"{folder}/{HEAD_CONFIG}", delta.head.config))
        files.append(weights_file(f"{folder}/model_head.safetensors", delta.head.tensors))
    interface = delta.folder / INTERFACE
    if files and interface.is_file():
        files.append(PlannedFile(f"{folder}/{INTERFACE}", (Copy.whole(InputFile(interface), of_base=False),)))
    return files


def weights_file(name: str, tensors: dict[str, Stored]) -> PlannedFile:
    """A safetensors file of tensors as they are."""
    header = encode_header([(t.name, t.dtype, t.shape) for t in tensors.values()], {})
    return PlannedFile(name, joined([Literal(header), *(stored_bytes(t, of_base=False) for t in tensors.values())]))


def _safe(delta: Delta) -> str:
    if not is_plain_name(delta.name) or len(os.fsencode(delta.name)) > LONGEST_NAME:
        raise MergeError(
            f"{delta.folder}: adapter name {delta.name!r} cannot be the name of a folder; rename the adapter"
        )
    return delta.name
