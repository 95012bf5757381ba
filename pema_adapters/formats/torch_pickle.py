"""Read pickled weights files (`.bin`) safely: which tensors they hold, and where their bytes are.

`torch.save` writes a zip archive: a pickle that describes the tensors, and one record with the raw bytes of each
storage. The records are not compressed, so tensors can be read by memory map, as from safetensors. The file is
untrusted: its claims are checked before a byte of it is copied.
"""

import math
import mmap
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pema_adapters.errors import FormatError, reading
from pema_adapters.formats.pickle_guard import find_expansion_attack
from pema_adapters.formats.safetensors_header import MAX_HEADER
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.io.input_file import InputFile

_LOCAL_HEADER = b"PK\x03\x04"
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_ADVICE = "if you trust its source, load it once and save it as safetensors (a model: save_pretrained(folder))"


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Read all tensors of a file that `torch.save` wrote, in its order. Imports torch; unpickles only tensors.

    Raises:
        FormatError: The file is not a zip archive of uncompressed records, holds anything but a dictionary of tensors,
            or has a tensor that takes more bytes than are stored for it.
    """
    source = InputFile(path)
    records = _read_records(path)
    tensors = _load_tensors(path)
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor)
    address, copies = (
        _find_mapping_address(path, tensors.values(), records),
        _copy_noncontiguous(path, tensors.values()),
    )
    source.check()  # torch opened it by its path
    file = _MappedFile(source, address, copies)
    return {name: file.describe(name, tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _MappedFile:
    """A file mapped by torch.

    Attributes:
        source: The file.
        address: Where torch has mapped it.
        copies: The bytes of its non-contiguous tensors, by `_region_key`.
    """

    source: InputFile
    address: int
    copies: dict[Any, np.ndarray]

    def describe(self, name: str, tensor: Any) -> StoredTensor:
        dtype, shape = str(_dtype_name(tensor)), tuple(tensor.shape)
        if not tensor.nbytes:
            return StoredTensor(name, dtype, shape, self.source, 0, 0)
        if not tensor.is_contiguous():
            return StoredTensor(name, dtype, shape, self.source, None, tensor.nbytes, self.copies[_region_key(tensor)])
        return StoredTensor(name, dtype, shape, self.source, tensor.data_ptr() - self.address, tensor.nbytes)


def _read_records(path: Path) -> dict[int, int]:
    """Return `{absolute offset: size in bytes}` of all records of the archive."""
    with reading(path), path.open("rb") as file:
        first = file.read(4)
        if first != _LOCAL_HEADER:
            raise FormatError(
                f"{path}: not a file of tensors that can be memory-mapped: expected a zip archive, as torch.save "
                f"writes since PyTorch 1.6, found a file that begins with {first!r}; {_ADVICE}"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                return {_find_data_offset(file, entry): entry.file_size for entry in _validate_entries(path, archive)}
        except FormatError:
            raise
        except Exception as error:  # zipfile raises anything on a damaged archive
            raise FormatError(
                f"{path}: not a file of tensors: its zip directory is damaged or truncated "
                f"({_summarize_error(error)}); download or save it again"
            ) from None


def _validate_entries(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the entries, after checking that they are raw bytes and that the pickle is safe to load."""
    entries = archive.infolist()
    for entry in entries:
        name, size = entry.filename.lower(), entry.file_size  # torch's reader ignores case
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != size:
            raise FormatError(f"{path}: record {entry.filename!r} is compressed; expected it stored; {_ADVICE}")
        if name.endswith("data.pkl"):
            _check_pickle(path, archive, entry)
        if name.endswith("byteorder") and archive.read(entry) != b"little":
            raise FormatError(f"{path}: saved on a big-endian machine; expected little-endian numbers; {_ADVICE}")
    return entries


def _check_pickle(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Refuse a pickle that would fill memory or take forever to unpickle."""
    where = f"{path}: {entry.filename!r}"
    # of everything that torch lets a pickle call, only bytearray(10**11) fills memory
    if entry.file_size > MAX_HEADER or b"bytearray" in (table := archive.read(entry)):
        raise FormatError(f"{where} ({entry.file_size} bytes) asks for more memory than tensors need")
    try:
        reason = find_expansion_attack(table)
    except ValueError as error:
        raise FormatError(
            f"{path}: not a file of tensors that torch can read safely ({_summarize_error(error)}): damaged, or holds "
            f"something else; {_ADVICE}"
        ) from None
    if reason:
        raise FormatError(f"{where} {reason}, as tensors never do: damaged or malicious")


def _find_data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return where a record's bytes begin: after its local header, whose padding the zip directory does not record."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or not header.startswith(_LOCAL_HEADER):
        raise zipfile.BadZipFile(f"no record at byte {entry.header_offset}")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return entry.header_offset + len(header) + name + extra


def _load_tensors(path: Path) -> dict[str, Any]:
    """Load the tensors with torch. `weights_only` runs no code; `mmap` leaves their bytes in the file."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is an error below
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # an unpickler raises anything on a damaged file
        raise FormatError(
            f"{path}: not a file of tensors that torch can read safely ({_summarize_error(error)}): damaged, or holds "
            f"something else; {_ADVICE}"
        ) from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a dictionary of tensors, found {type(found).__name__}; {_ADVICE}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise FormatError(
                f"{path}: expected a dictionary of tensors, found {name!r}: {type(tensor).__name__}; {_ADVICE}"
            )
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_tensor(path: Path, name: str, tensor: Any) -> None:
    """Refuse a tensor of a kind that checkpoints do not have, or with fewer bytes in the file than it takes."""
    where = f"{path}: tensor {name!r}"
    if _dtype_name(tensor) is None or str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        raise FormatError(f"{where}: {tensor.dtype} ({tensor.layout}) is not supported in a checkpoint; {_ADVICE}")
    held, wanted = tensor.untyped_storage().nbytes(), _count_bytes(tensor)
    if wanted > held:
        raise FormatError(
            f"{where}: {list(tensor.shape)} takes {wanted} bytes, but only {held} are stored: an expanded tensor or a "
            "damaged file; expected all of its values: save it with .contiguous()"
        )


def _find_mapping_address(path: Path, tensors: Iterable[Any], records: dict[int, int]) -> int:
    """Return the address at which torch has mapped the file: the one that puts every storage on a record of its size.

    torch does not tell a storage's offset. That such an address exists also proves that every storage is a record of
    the file: a pickle could ask for memory that nothing in the file fills, or for more than a record has.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors) if s.nbytes()}
    if not storages:
        return 0
    first = min(storages)
    found = [
        first - at
        for at in records
        if (first - at) % mmap.PAGESIZE == 0
        and all(records.get(address - first + at) == size for address, size in storages.items())
    ]
    if len(found) != 1:
        raise FormatError(f"{path}: its tensors are not the records of its zip archive; the file is damaged; {_ADVICE}")
    return int(found[0])


def _copy_noncontiguous(path: Path, tensors: Iterable[Any]) -> dict[Any, np.ndarray]:
    """Copy the tensors that are not contiguous in the file (transposes, slices), keyed by `_region_key`.

    They are rare, so they are held in memory. A file whose copies would take more memory than it has bytes, because
    many are views of one storage, is refused.
    """
    loose = {_region_key(tensor): tensor for tensor in tensors if not tensor.is_contiguous()}
    wanted, held = sum(_count_bytes(tensor) for tensor in loose.values()), path.stat().st_size
    if wanted > held:
        raise FormatError(
            f"{path}: {len(loose)} transposed or sliced tensors take {wanted} bytes of memory, more than the file's "
            f"{held}; save them with .contiguous()"
        )
    return {region: _to_bytes(tensor.contiguous()) for region, tensor in loose.items()}


def _to_bytes(tensor: Any) -> np.ndarray:
    import torch

    raw: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    raw.flags.writeable = False
    return raw


def _count_bytes(tensor: Any) -> int:
    """Return the bytes that all values take; torch's own count overflows."""
    return int(math.prod(tensor.shape) * tensor.itemsize)


def _region_key(tensor: Any) -> Any:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _dtype_name(tensor: Any) -> str | None:
    return _DTYPES.get(str(tensor.dtype).removeprefix("torch."))


def _summarize_error(error: Exception) -> str:
    """Return the reason in one line; torch puts it below a paragraph of advice."""
    lines = str(error).splitlines() or [type(error).__name__]
    reason = next((line for line in lines if "Unpickler error:" in line), lines[0])
    return reason.split("Unpickler error:")[-1].strip().split(". ")[0][:200]
