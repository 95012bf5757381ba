"""Finding the delta that a folder holds: itself, one level down, or two."""

import re
from pathlib import Path

from pema_adapters.errors import FormatError
from pema_adapters.formats.adapter_config import ADAPTER_CONFIG, AdapterConfig
from pema_adapters.formats.checkpoint import CONFIG, INDEX, PICKLE, PICKLE_INDEX, SINGLE
from pema_adapters.formats.trainer_checkpoints import suggest_choice

FULL_WEIGHTS = (SINGLE, INDEX, PICKLE_INDEX, PICKLE)
MARKER = "pema_merge.json"
LEVELS = 2
LISTED = 8


def find_delta(folder: Path, adapter: str | None) -> Path:
    """The folder of the delta: `folder`, or the only one on the first level below it that holds any.

    Two levels are looked at: `run/task`, `run/checkpoint-500`, `run/checkpoint-500/task`. Hidden folders and what
    earlier merges wrote are left out. `adapter` picks one by the name of the adapter or of its folder, or by its path
    in `folder`. Raises `FormatError` where there is none, or where there are several.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise FormatError(f"{folder}: {found}; expected the folder that save_adapter, save_delta or a Trainer wrote")
    seen: list[Path] = []
    level = [folder]
    for _ in range(1 + LEVELS):
        deltas = [path for path in level if _is_delta(path)]
        seen += deltas
        chosen = _with_rows(deltas) if adapter is None else [d for d in deltas if _is_called(d, adapter, folder)]
        if chosen:
            return _only(folder, adapter, chosen)
        level = [child for path in level for child in _folders_in(path, folder)]
    raise FormatError(_none(folder, adapter, seen))


def _only(folder: Path, adapter: str | None, found: list[Path]) -> Path:
    by_place: dict[Path, Path] = {}
    for path in found:
        by_place.setdefault(path.resolve(), path)  # `latest` may be a link to another one
    different = list(by_place.values())
    if len(different) == 1:
        return different[0]
    called = "" if adapter is None else f" called {adapter!r}"
    raise FormatError(
        f"{folder}: holds {len(different)} deltas{called} ({_listed(folder, different)}); "
        f"{suggest_choice(folder, different, adapter)}"
    )


def _none(folder: Path, adapter: str | None, seen: list[Path]) -> str:
    if adapter is not None and seen:
        here = ", ".join(_names(folder)) if seen == [folder] else _listed(folder, seen)
        return f"{folder}: no adapter {adapter!r} here; found: {here}"
    if (folder / MARKER).exists():
        return f"{folder}: what an earlier merge wrote (it holds {MARKER}), not a delta; give the folder of the adapter"
    return (
        f"{folder}: no delta here or one level below, or two; expected {ADAPTER_CONFIG} with weights (save_adapter), "
        f"or {CONFIG} with {SINGLE} (save_delta, Trainer)"
    )


def _listed(folder: Path, found: list[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in found[:LISTED]]
    return ", ".join(names + ["..."] * (len(found) > LISTED))


def _folders_in(parent: Path, top: Path) -> list[Path]:
    """The folders in which deltas may lie, checkpoint-500 before checkpoint-1000; unreadable ones have none.

    A link to `top` or to a folder around it would lead in circles, or to what belongs to somebody else.
    """
    if (parent / MARKER).exists():
        return []
    try:
        children = [child for child in parent.iterdir() if not child.name.startswith(".") and child.is_dir()]
        inside = [child for child in children if not top.resolve().is_relative_to(child.resolve())]
    except (OSError, RuntimeError):  # RuntimeError: links that lead in circles, before Python 3.13
        return []
    return sorted(inside, key=_in_human_order)


def _in_human_order(path: Path) -> list[tuple[int, str]]:
    """`checkpoint-500` before `checkpoint-1000`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def is_adapter(folder: Path) -> bool:
    """Whether `save_adapter` wrote the folder."""
    return (folder / ADAPTER_CONFIG).is_file()


def _is_delta(folder: Path) -> bool:
    if (folder / MARKER).exists():  # what an earlier merge wrote
        return False
    return is_adapter(folder) or ((folder / CONFIG).is_file() and first_file(folder, FULL_WEIGHTS) is not None)


def _is_called(delta: Path, adapter: str, folder: Path) -> bool:
    return adapter.rstrip("/") == delta.relative_to(folder).as_posix() or adapter in _names(delta)


def _names(delta: Path) -> list[str]:
    """The names by which `--adapter` may pick a delta, beside its path; a damaged one has that of its folder only."""
    config = _config(delta)
    return [delta.name] if config is None else list(dict.fromkeys((config.name, delta.name)))


def _with_rows(deltas: list[Path]) -> list[Path]:
    """Those that hold PEMA rows by their config, if there are any; a Trainer saves every adapter of a model."""
    found = [delta for delta in deltas if (config := _config(delta)) is None or config.has_pema]
    return found or deltas


def _config(delta: Path) -> AdapterConfig | None:
    """adapter_config.json; None for a full delta, and where it cannot be read: whoever picks that one is told."""
    try:
        return AdapterConfig.read(delta) if is_adapter(delta) else None
    except FormatError:
        return None


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that is there."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
