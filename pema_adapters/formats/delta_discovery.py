"""Find the delta in a folder: the folder itself, or one at most two levels below."""

import re
from pathlib import Path

from pema_adapters.errors import FormatError
from pema_adapters.formats.adapter_config import ADAPTER_CONFIG, AdapterConfig
from pema_adapters.formats.checkpoint import CONFIG
from pema_adapters.formats.trainer_checkpoints import suggest_choice
from pema_adapters.formats.weights import INDEX, PICKLE, PICKLE_INDEX, SINGLE

FULL_WEIGHTS = (SINGLE, INDEX, PICKLE_INDEX, PICKLE)
MERGE_MANIFEST = "pema_merge.json"
MAX_DEPTH = 2
MAX_LISTED = 8


def find_delta(folder: Path, adapter: str | None) -> Path:
    """Return the folder of the delta: `folder`, or the only one on the first level below that has any.

    Two levels are searched: `run/task`, `run/checkpoint-500`, `run/checkpoint-500/task`. Hidden folders and outputs of
    earlier merges are skipped.

    Args:
        folder: Where to search.
        adapter: The name of the adapter, the name of its folder, or its path in `folder`; None for the only one.

    Raises:
        FormatError: There is no delta, or there are several.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        raise FormatError(f"{folder}: {found}; expected a folder written by save_adapter, save_delta or a Trainer")
    seen: list[Path] = []
    level = [folder]
    for _ in range(1 + MAX_DEPTH):
        deltas = [path for path in level if _is_delta(path)]
        seen += deltas
        chosen = _prefer_pema(deltas) if adapter is None else [d for d in deltas if _matches(d, adapter, folder)]
        if chosen:
            return _require_single(folder, adapter, chosen)
        level = [child for path in level for child in _list_subfolders(path, folder)]
    raise FormatError(_explain_none(folder, adapter, seen))


def _require_single(folder: Path, adapter: str | None, found: list[Path]) -> Path:
    by_place: dict[Path, Path] = {}
    for path in found:
        by_place.setdefault(path.resolve(), path)  # `latest` may be a link to another folder
    different = list(by_place.values())
    if len(different) == 1:
        return different[0]
    called = "" if adapter is None else f" called {adapter!r}"
    raise FormatError(
        f"{folder}: holds {len(different)} deltas{called} ({_format_paths(folder, different)}); "
        f"{suggest_choice(folder, different, adapter)}"
    )


def _explain_none(folder: Path, adapter: str | None, seen: list[Path]) -> str:
    if adapter is not None and seen:
        here = ", ".join(_list_names(folder)) if seen == [folder] else _format_paths(folder, seen)
        return f"{folder}: no adapter {adapter!r} here; found: {here}"
    if (folder / MERGE_MANIFEST).exists():
        return f"{folder}: the output of a merge (it holds {MERGE_MANIFEST}), not a delta; give the adapter's folder"
    return (
        f"{folder}: no delta here or up to two levels below; expected {ADAPTER_CONFIG} with weights (save_adapter), "
        f"or {CONFIG} with {SINGLE} (save_delta, Trainer)"
    )


def _format_paths(folder: Path, found: list[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in found[:MAX_LISTED]]
    return ", ".join(names + ["..."] * (len(found) > MAX_LISTED))


def _list_subfolders(parent: Path, top: Path) -> list[Path]:
    """Return the subfolders to search, checkpoint-500 before checkpoint-1000; none if `parent` cannot be read.

    Links to `top` or to a folder around it are skipped: they lead in circles, or to foreign files.
    """
    if (parent / MERGE_MANIFEST).exists():
        return []
    try:
        children = [child for child in parent.iterdir() if not child.name.startswith(".") and child.is_dir()]
        inside = [child for child in children if not top.resolve().is_relative_to(child.resolve())]
    except (OSError, RuntimeError):  # RuntimeError: circular links, before Python 3.13
        return []
    return sorted(inside, key=_natural_key)


def _natural_key(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts `checkpoint-500` before `checkpoint-1000`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def is_adapter(folder: Path) -> bool:
    """Return whether `save_adapter` wrote the folder."""
    return (folder / ADAPTER_CONFIG).is_file()


def _is_delta(folder: Path) -> bool:
    if (folder / MERGE_MANIFEST).exists():  # the output of a merge
        return False
    return is_adapter(folder) or ((folder / CONFIG).is_file() and find_first_file(folder, FULL_WEIGHTS) is not None)


def _matches(delta: Path, adapter: str, folder: Path) -> bool:
    return adapter.rstrip("/") == delta.relative_to(folder).as_posix() or adapter in _list_names(delta)


def _list_names(delta: Path) -> list[str]:
    """Return the names that `--adapter` accepts for a delta, besides its path; a damaged one has only its folder's."""
    config = _try_read_config(delta)
    return [delta.name] if config is None else list(dict.fromkeys((config.name, delta.name)))


def _prefer_pema(deltas: list[Path]) -> list[Path]:
    """Return the deltas with PEMA if there are any, else all: a Trainer saves every adapter of a model."""
    found = [delta for delta in deltas if (config := _try_read_config(delta)) is None or config.has_pema]
    return found or deltas


def _try_read_config(delta: Path) -> AdapterConfig | None:
    """Return the adapter's configuration; None for a full delta, or if it is damaged, which reading it will report."""
    try:
        return AdapterConfig.read(delta) if is_adapter(delta) else None
    except FormatError:
        return None


def find_first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first of `names` that is a file in `folder`, None if none is."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
