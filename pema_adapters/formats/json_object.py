"""JSON files whose content is one object: configs, indexes, manifests."""

import json
from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError
from pema_adapters.io.input_file import InputFile

MAX_JSON = 100_000_000
"""The largest JSON file that is parsed, in bytes; the index of the largest checkpoints has about 20 MB."""


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        FormatError: The file is missing, larger than MAX_JSON, or not a JSON object.
    """
    return parse_json(InputFile(path))


def parse_json(file: InputFile) -> dict[str, Any]:
    """Read the JSON object in an open file; raises like `read_json`."""
    if file.size > MAX_JSON:
        raise FormatError(f"{file.path}: {file.size:,} bytes, expected JSON of at most {MAX_JSON:,}")
    return decode_json(file.read(0, file.size), file.path)


def decode_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse `data`, the content of `path`, as a JSON object; raises like `read_json`."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
