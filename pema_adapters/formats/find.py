"""Finding the delta that a folder holds, itself or one level down."""

from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError
from pema_adapters.formats.checkpoint import CONFIG, INDEX, SINGLE, read_json

ADAPTER_CONFIG = "adapter_config.json"
FULL_WEIGHTS = (SINGLE, INDEX, "pytorch_model.bin")
MARKER = "pema_merge.json"
METHOD = "pema"


def find_delta(folder: Path, adapter: str | None) -> Path:
    """The folder of the delta: `folder`, or the only one a level below; `adapter` names one of several.

    Raises `FormatError` where there is none, or where there are several.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; expected what save_adapter, save_delta or a Trainer wrote")
    if _is_delta(folder) and (adapter is None or adapter in _names(folder)):
        return folder
    below = [child for child in sorted(folder.iterdir()) if child.is_dir() and _is_delta(child)]
    chosen = _with_rows(below) if adapter is None else [child for child in below if adapter in _names(child)]
    if len(chosen) == 1:
        return chosen[0]
    raise FormatError(_none_or_several(folder, adapter, chosen or below))


def _none_or_several(folder: Path, adapter: str | None, found: list[Path]) -> str:
    names = ", ".join(child.name for child in found)
    if adapter is not None:
        here = ", ".join(_names(folder)) if _is_delta(folder) else names
        return f"{folder}: no adapter {adapter!r} here; found: {here or 'none'}"
    if found:
        return f"{folder}: holds {len(found)} deltas ({names}); pick one with --adapter NAME"
    return (
        f"{folder}: no delta here or one level below; expected {ADAPTER_CONFIG} with weights (save_adapter), "
        f"or {CONFIG} with {SINGLE} (save_delta, Trainer)"
    )


def is_adapter(folder: Path) -> bool:
    """Whether `save_adapter` wrote the folder."""
    return (folder / ADAPTER_CONFIG).is_file()


def _is_delta(folder: Path) -> bool:
    if (folder / MARKER).exists():  # what an earlier merge wrote
        return False
    return is_adapter(folder) or ((folder / CONFIG).is_file() and first_file(folder, FULL_WEIGHTS) is not None)


def _names(folder: Path) -> list[str]:
    """The names by which `--adapter` may pick a folder."""
    if not is_adapter(folder):
        return [folder.name]
    name = str(read_json(folder / ADAPTER_CONFIG).get("name"))
    return [folder.name] if name == folder.name else [name, folder.name]


def _with_rows(folders: list[Path]) -> list[Path]:
    """Those that hold PEMA rows by their config, if there are any; a Trainer saves every adapter of a model."""
    found = [f for f in folders if not is_adapter(f) or has_method(read_json(f / ADAPTER_CONFIG).get("config"))]
    return found or folders


def has_method(config: Any) -> bool:
    """Whether an adapter config, as in adapter_config.json, is PEMA or a union with it."""
    members = config.get("configs") if isinstance(config, dict) else None
    return any(is_method(member) for member in members) if isinstance(members, list) else is_method(config)


def is_method(config: Any) -> bool:
    """Whether one member of a union is PEMA."""
    return bool((config.get("architecture") if isinstance(config, dict) else config) == METHOD)


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that is there."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
