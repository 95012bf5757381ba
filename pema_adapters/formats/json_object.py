"""JSON files whose content is one object: configs, indexes, manifests."""

import json
from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError
from pema_adapters.io.input_file import InputFile

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
