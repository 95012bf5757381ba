"""Data sets by name: files and folders on this machine, or a data set of the Hub."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError

_AS_IT_IS = {"keep_default_na": False}  # a text may be "null" or "NA"
BUILDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # suffix -> builder of datasets, its options
    ".txt": ("text", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", _AS_IT_IS),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, **_AS_IT_IS}),  # a quotation mark is a letter there
    ".parquet": ("parquet", {}),
}


def load_data(names: list[str]) -> dict[str, Any]:
    """`datasets.Dataset`s and `IterableDataset`s by what errors call them: the name as given, and the split.

    Args:
        names: a file (a suffix of BUILDERS, .gz behind it or not), a folder that `save_to_disk` wrote, a folder of
            data files, or a data set of the Hub, `NAME` or `NAME:CONFIGURATION`. What lies here is streamed, so
            that no copy goes into the cache of datasets.

    Raises:
        FormatError: nothing there, or not readable as what the name promises.
    """
    from datasets.exceptions import DatasetsError

    found: dict[str, Any] = {}
    for name in names:
        try:
            data = _load(name)
        except FormatError:
            raise
        except (OSError, ValueError, DatasetsError) as error:
            raise FormatError(f"{name}: cannot be read as a data set: {error}") from error
        splits = data if isinstance(data, Mapping) else {"": data}
        found.update({f"{name} {split}".rstrip(): part for split, part in splits.items()})
    return found


def _load(name: str) -> Any:
    import datasets

    path = Path(name)
    if path.is_file():
        builder, options = _builder(path)
        return datasets.load_dataset(builder, data_files=[name], split="train", streaming=True, **options)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)
    if path.is_dir():
        return datasets.load_dataset(name, streaming=True)
    if path.suffix in {*BUILDERS, ".gz"} or path.is_absolute():
        raise FormatError(f"{name}: no such file or folder")
    repository, _, configuration = name.partition(":")
    return datasets.load_dataset(repository, configuration or None)


def _builder(path: Path) -> tuple[str, Mapping[str, Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    if not suffixes or suffixes[-1] not in BUILDERS:
        found = path.suffix or "no suffix"
        raise FormatError(f"{path}: found {found}, expected one of {', '.join(BUILDERS)}, or .gz behind these")
    return BUILDERS[suffixes[-1]]
