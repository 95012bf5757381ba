"""Read, validate and write headers of safetensors files, and decode their numbers.

A file is `8-byte little-endian length n | n bytes of JSON | data`. The JSON maps each tensor's name to its dtype, shape
and byte range in the data. `read_header` validates everything, so that no caller has to check again.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.io.input_file import InputFile

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
MAX_TENSORS = 200_000  # of one file; the largest mixture-of-experts models have fewer in all of their shards
MAX_DIMENSIONS = 64
METADATA = "__metadata__"

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
FLOATS = ("F64", "F32", "F16", "BF16")
_BITS = {name: 8 * size for name, size in DTYPE_BYTES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4",
    "I64": "<i8", "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """A validated header.

    Attributes:
        source: The file.
        tensors: Its tensors by name, in the order of their offsets.
        metadata: Its `__metadata__`, {} if there is none.
        data_start: The absolute offset of the data.
    """

    source: InputFile
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    data_start: int


def size_in_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor: `size_in_bytes("BF16", (3, 2)) == 12`.

    Raises:
        KeyError: The dtype is unknown.
    """
    bits = _BITS[dtype] * math.prod(shape)
    return -(-bits // 8)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and validate the header of a file.

    Raises:
        FormatError: The file is missing or damaged; the message names the tensor.
    """
    path = Path(path)
    source = InputFile(path)
    length = _parse_length(path, source.size, source.read(0, min(LENGTH_BYTES, source.size)))
    data_start = LENGTH_BYTES + length
    entries = _parse_json(path, source.read(LENGTH_BYTES, data_start))
    metadata = _validate_metadata(path, entries.pop(METADATA, {}))
    tensors = [_parse_tensor(source, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_layout(path, tensors, data_start, source.size)
    return Header(source, {tensor.name: tensor for tensor in tensors}, metadata, data_start)


def encode_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str], padding: int = 0
) -> bytes:
    """Return the header of a file, its length included, padded with spaces to a multiple of 8 bytes.

    Args:
        tensors: `(name, dtype, shape)` of each tensor, in the order of their data.
        metadata: The `__metadata__`; none if empty.
        padding: More spaces to add, a multiple of 8.
    """
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + size_in_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 + padding)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def as_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Decode stored bytes, uint8 [..., n * itemsize], to float32 [..., n]; exact for F32, F16 and BF16.

    Raises:
        FormatError: Numbers of this dtype cannot be read.
    """
    raw = np.ascontiguousarray(raw)
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype("<u4") << 16).view("<f4")
    if dtype not in NUMPY_DTYPES:
        raise FormatError(f"cannot read numbers of dtype {dtype}; expected BF16 or one of {', '.join(NUMPY_DTYPES)}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite
        return raw.view(NUMPY_DTYPES[dtype]).astype("<f4", copy=False)


def _parse_length(path: Path, size: int, first: bytes) -> int:
    if len(first) < LENGTH_BYTES:
        raise FormatError(f"{path}: {size} bytes are too few for a safetensors file; the file is empty or truncated")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        raise FormatError(f"{path}: header of {length} bytes, expected at most {MAX_HEADER}; not a safetensors file?")
    if LENGTH_BYTES + length > size:
        raise FormatError(f"{path}: header of {length} bytes in a file of {size}; the file is truncated")
    return length


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    count = text.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise FormatError(f"{path}: header of {count:,} tensors, expected at most {MAX_TENSORS:,} in one file")
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_reject_duplicates, parse_int=_parse_integer)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: header is not valid JSON ({error})") from None
    if not text.startswith(b"{") or not isinstance(entries, dict):
        raise FormatError(
            f"{path}: header is not a JSON object; expected tensor names with dtype, shape and data_offsets"
        )
    return entries


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate name {key!r}")
        for text in (key, value):
            if isinstance(text, str):
                text.encode()  # UnicodeEncodeError, a ValueError: a lone surrogate, which only JSON can spell
        found[key] = value
    return found


def _parse_integer(text: str) -> int | float:
    """Parse an integer as the safetensors library does: -0 is a float there, and refused as a size."""
    return int(text) if text != "-0" else -0.0


def _validate_metadata(path: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{path}: {METADATA} must map names to strings, found {str(found)[:80]!r}")
    return found


def _parse_tensor(source: InputFile, name: str, entry: Any, data_start: int) -> StoredTensor:
    path = source.path
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{path}: tensor {name!r}: expected dtype, shape and data_offsets, found {str(entry)[:80]!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise FormatError(
            f"{path}: tensor {name!r}: unknown dtype {str(dtype)[:80]!r}; expected one of {', '.join(_BITS)}"
        )
    if not _is_size_list(shape) or len(shape) > MAX_DIMENSIONS:
        raise FormatError(f"{path}: tensor {name!r}: shape {str(shape)[:80]} is not a list of sizes")
    if not _is_size_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{path}: tensor {name!r}: data_offsets {str(offsets)[:80]} are not [begin, end]")
    begin, end = offsets
    expected = size_in_bytes(dtype, shape)
    if _BITS[dtype] * math.prod(shape) % 8:
        raise FormatError(f"{path}: tensor {name!r}: {dtype} {shape} does not end with a whole byte")
    if end - begin != expected:
        raise FormatError(
            f"{path}: tensor {name!r}: {dtype} {str(shape)[:80]} takes {str(expected)[:20]} bytes, "
            f"but its data_offsets hold {end - begin}"
        )
    return StoredTensor(name, dtype, tuple(shape), source, data_start + begin, expected)


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Check that the tensors tile the data: no hole, no overlap, nothing beyond the end, nothing left over."""
    marks = [(None, data_start, data_start)]
    marks += [(t.name, start := t.start or 0, start + t.nbytes) for t in tensors]  # type: ignore[misc]
    for (_, _, expected), (name, start, end) in pairwise(marks):
        if start != expected:
            kind = "overlaps the tensor before it" if start < expected else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {name!r} {kind}: it begins at byte {start}, expected {expected}")
        if end > size:
            raise FormatError(f"{path}: tensor {name!r} ends at byte {end}, but the file has {size}; it is truncated")
    if marks[-1][2] != size:
        raise FormatError(f"{path}: {size - marks[-1][2]} bytes after the last tensor belong to no tensor")
