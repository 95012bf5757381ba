"""Load data sets by name: local files and folders, and data sets of the Hub."""

import csv
import glob
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError, PemaError
from pema_adapters.hub.pretrained import NEEDS_CODE
from pema_adapters.scanning.limits import check_limits

_KEEP_NA = {"keep_default_na": False}  # "null" and "NA" are text
BUILDERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # suffix -> builder of `datasets`, its options
    ".txt": ("text", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", _KEEP_NA),
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE, **_KEEP_NA}),  # quotation marks are text
    ".parquet": ("parquet", {"batch_size": 1_000}),  # the default is a whole row group
}

_SUPPORTED = f"{', '.join(BUILDERS)}, or these with .gz"
_SELF_EXPLANATORY = (OSError, ValueError, EOFError, zlib.error)  # messages that need no class name before them
_MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "tokenizer_config.json")
METADATA_FILES = ("dataset_infos.json",)  # describe the data beside them


def load_data(names: list[str], trust_remote_code: bool = False) -> dict[str, Any]:
    """Load data sets by name.

    Args:
        names: files (a suffix of BUILDERS, with or without .gz), folders that `save_to_disk` wrote, folders of both at
            any depth, or data sets of the Hub, `NAME` or `NAME:CONFIGURATION`. Files are streamed: the cache of
            `datasets` gets no copy.
        trust_remote_code: run the loading script of a data set of the Hub, if this version of `datasets` can.

    Returns:
        `datasets.Dataset`s and `IterableDataset`s, keyed by the names that errors use: "NAME" or "NAME SPLIT".

    Raises:
        FormatError: the data do not exist, or cannot be read in the format that the name promises.
    """
    found: dict[str, Any] = {}
    for name in list(chain.from_iterable(map(_expand_folder, names))):  # refuse names before loading any
        with translate_errors(name), _suggest_remote_code(name, trust_remote_code):
            data = _load_one(name, trust_remote_code)
        splits = data if isinstance(data, Mapping) else {"": data}
        found.update({f"{name} {split}".rstrip(): part for split, part in splits.items()})
    return found


@contextmanager
def translate_errors(name: str) -> Iterator[None]:
    """Turn an exception of `datasets` into a FormatError that names the data.

    All exceptions are caught, because Arrow and `datasets` raise any class for damaged data, KeyError and TypeError
    among them.
    """
    try:
        yield
    except PemaError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, _SELF_EXPLANATORY) and str(error) else f"{type(error).__name__}: "
        said = " ".join(str(error).split())
        raise FormatError(f"{name}: cannot be read as a data set: {kind}{said}") from error


@contextmanager
def _suggest_remote_code(name: str, trust_remote_code: bool) -> Iterator[None]:
    """Refuse a loading script with a hint at --trust-remote-code, where this version of `datasets` can run it."""
    try:
        yield
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise FormatError(f"{name}: the data set {NEEDS_CODE}") from error


def iterate_stream(items: Iterator[Any], name: str) -> Iterator[Any]:
    """Iterate over a stream of `datasets`, and turn its exceptions into a FormatError that names the data."""
    while True:
        with translate_errors(name):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def _expand_folder(name: str) -> list[str]:
    """Return the data sets in a folder, or the name itself if it is not a folder of data."""
    folder = Path(name)
    if not folder.is_dir() or _is_saved_dataset(folder):
        return [name]
    if (folder / "config.json").is_file() and any(any(folder.glob(one)) for one in _MODEL_FILES):
        raise FormatError(
            f"{name}: the folder of a model or tokenizer; expected data: {_SUPPORTED}, or a save_to_disk folder"
        )
    found = [str(path) for path in _find_data(folder)]
    if not found:
        raise FormatError(f"{name}: a folder without data; expected {_SUPPORTED}, or a save_to_disk folder")
    return found


def _find_data(folder: Path) -> Iterator[Path]:
    """Find data files and saved data sets, sorted by name; skip hidden ones and links to folders."""
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_file() and _find_suffix(path) in BUILDERS and path.name not in METADATA_FILES:
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from [path] if _is_saved_dataset(path) else _find_data(path)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _load_one(name: str, trust_remote_code: bool) -> Any:
    import datasets

    path = Path(name)
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_saved(name)
    if path.suffix in {*BUILDERS, ".gz"} or path.is_absolute():
        raise FormatError(f"{name}: no such file or folder")
    repository, _, configuration = name.partition(":")
    return datasets.load_dataset(repository, configuration or None, trust_remote_code=trust_remote_code)


def _load_saved(name: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(name)
    except IndexError:  # datasets writes no file for an empty split, and fails to read it back
        raise FormatError(f"{name}: a saved data set with a split without rows; remove the split, then save") from None


def _load_file(path: Path) -> Any:
    import datasets

    suffix = _find_suffix(path)
    if suffix not in BUILDERS:
        raise FormatError(f"{path}: found {suffix or 'no suffix'}, expected one of {_SUPPORTED}")
    if "::" in str(path):
        raise FormatError(f"{path}: datasets reads '::' in a name as chained URLs; rename the file")
    if not path.stat().st_size:
        return datasets.Dataset.from_dict({})
    check_limits(path, suffix)
    builder, options = BUILDERS[suffix]
    pattern = glob.escape(str(path))  # otherwise datasets expands [1] and * in names
    try:
        return datasets.load_dataset(builder, data_files=[pattern], split="train", streaming=True, **options)
    except StopIteration:  # datasets raises it for JSON without a line
        return datasets.Dataset.from_dict({})


def _find_suffix(path: Path) -> str:
    """Return the last suffix before .gz, in lower case."""
    return next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() != ".gz"), "")
