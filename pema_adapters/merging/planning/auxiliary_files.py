"""The files of the output that are not its weights: those that are copied through, and what stays an adapter."""

from pathlib import Path

from pema_adapters.errors import reading
from pema_adapters.formats.adapter_config import ADAPTER_CONFIG
from pema_adapters.formats.checkpoint import CONFIG
from pema_adapters.formats.delta import HEAD_CONFIG, Delta
from pema_adapters.formats.delta_discovery import MERGE_MANIFEST
from pema_adapters.formats.modules_json import MODULES, read_module_paths
from pema_adapters.formats.safetensors_header import encode_header
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.weights import INDEX
from pema_adapters.io.input_file import InputFile
from pema_adapters.io.safe_paths import check_link
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import BytesSegment, CopySegment, make_tensor_segment, merge_segments
from pema_adapters.merging.planning.config_files import json_file

WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".gguf", ".ggml",
    ".tflite", ".pb", ".npz", ".mlmodel", ".pkl", ".lock", ".incomplete",
}  # fmt: skip
ADAPTERS = "adapters"
INTERFACE = "adapter_interface.json"


def copy_through_files(folder: Path, *, in_place: bool = False) -> list[PlannedFile]:
    """Copy tokenizer, generation configuration, README and other small files of the base.

    Weights in any format are left behind, and folders too, but for the modules of a Sentence Transformers model.

    Raises:
        FormatError: one of them, or config.json, is a link that leads out of the folder, and is not left in place.
    """
    top = [path for path in sorted(folder.iterdir()) if _is_copied_through(path) and not path.is_dir()]
    below = [path for module in _modules(folder) for path in (module, *_walk(module))]
    if not in_place:
        for path in (folder / CONFIG, *top, *below):
            check_link(path, folder)
    return [_copy_file(path, folder) for path in top + below if path.is_file()]


def _is_copied_through(path: Path) -> bool:
    name = path.name
    own = {CONFIG, INDEX, MERGE_MANIFEST, ADAPTER_CONFIG, HEAD_CONFIG, "trainer_state.json"}
    return not (name.startswith(".") or path.suffix in WEIGHT_SUFFIXES or name.endswith(".index.json") or name in own)


def _modules(folder: Path) -> list[Path]:
    return [folder / name for name in read_module_paths(folder / MODULES) if (folder / name).is_dir()]


def _walk(folder: Path) -> list[Path]:
    """List the contents of a folder, without hidden names. Raises `FormatError` if a folder cannot be listed."""
    found: list[Path] = []
    with reading(folder):
        for path in sorted(folder.iterdir()):
            if not path.name.startswith("."):
                found += [path, *(_walk(path) if path.is_dir() and not path.is_symlink() else ())]
    return found


def _copy_file(path: Path, folder: Path) -> PlannedFile:
    return PlannedFile(path.relative_to(folder).as_posix(), merge_segments([CopySegment.whole(InputFile(path))]))


def adapter_files(delta: Delta) -> list[PlannedFile]:
    """Return what cannot be folded into weights: `adapters/NAME`, an artifact without PEMA for `load_adapter`."""
    if delta.kind == "full":
        return []
    folder = f"{ADAPTERS}/{delta.name}"
    files = []
    if delta.remaining.config is not None:
        files.append(json_file(f"{folder}/{ADAPTER_CONFIG}", delta.remaining.config.content))
        files.append(weights_file(f"{folder}/adapter.safetensors", delta.remaining.tensors))
    if delta.head is not None and not delta.head.is_static:
        files.append(json_file(f"{folder}/{HEAD_CONFIG}", delta.head.config))
        files.append(weights_file(f"{folder}/model_head.safetensors", delta.head.tensors))
    interface = delta.folder / INTERFACE
    if files and (interface.is_file() or interface.is_symlink()):
        check_link(interface, delta.folder)
        files.append(PlannedFile(f"{folder}/{INTERFACE}", (CopySegment.whole(InputFile(interface), of_base=False),)))
    return files


def weights_file(name: str, tensors: dict[str, StoredTensor]) -> PlannedFile:
    """Return a safetensors file of tensors as they are."""
    header = encode_header([(t.name, t.dtype, t.shape) for t in tensors.values()], {})
    return PlannedFile(
        name, merge_segments([BytesSegment(header), *(make_tensor_segment(t, of_base=False) for t in tensors.values())])
    )
