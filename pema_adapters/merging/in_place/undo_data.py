"""Contents of an undo journal: original bytes, whole files, and digests that reveal later changes."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pema_adapters.errors import MergeError
from pema_adapters.io.digest import BackgroundSha256
from pema_adapters.io.input_file import read_range
from pema_adapters.merging.in_place.change_set import ChangeSet
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import CHUNK

SAMPLES, SAMPLE_BYTES = 64, 4096

Digest: TypeAlias = list[Any]
"""Size in bytes and sha256."""


def sample_outside(path: Path, ranges: np.ndarray) -> str:
    """Return the sha256 of up to 64 blocks of a file, evenly spaced, that lie outside of `ranges` int64 [n, 2]."""
    size = path.stat().st_size
    count = min(SAMPLES, size // SAMPLE_BYTES)
    starts = np.arange(count, dtype=np.int64) * (size - SAMPLE_BYTES) // max(count - 1, 1)
    ends = ranges.sum(axis=1)
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for start in starts.tolist():
            k = int(np.searchsorted(ends, start, side="right"))
            if k == len(ranges) or ranges[k, 0] >= start + SAMPLE_BYTES:
                digest.update(read_range(file.fileno(), start, start + SAMPLE_BYTES))
    return digest.hexdigest()


def digest_ranges(path: Path, ranges: np.ndarray) -> str:
    """Return the sha256 of what a file holds in `ranges` int64 [n, 2], one after another."""
    with path.open("rb", buffering=0) as file, BackgroundSha256() as digest:
        for begin, end in split_ranges(ranges):
            digest.update(read_range(file.fileno(), begin, end))
        return digest.hexdigest()


def copy_mode(path: Path, base: Path, name: str) -> None:
    """Give a new file the mode of the file that it replaces, or else make it no more readable than the weights."""
    weights = sorted(base.glob("*.safetensors"))
    like = base / name if (base / name).exists() else weights[0] if weights else base
    found = like.stat().st_mode
    path.chmod((found if (base / name).exists() else path.stat().st_mode & (found | 0o600)) & 0o777)
    copy_owner(path, like)


def copy_owner(path: Path, like: Path) -> None:
    """Give a file to the owner of another one, where the system lets us."""
    found, own = like.stat(), path.stat()
    if (own.st_uid, own.st_gid) != (found.st_uid, found.st_gid):
        with suppress(OSError):  # only root may give files away
            os.chown(path, found.st_uid, found.st_gid)


def save_copy(data: "bytes | PlannedFile", path: Path, like: Path | None = None) -> list[Any]:
    """Write `data` to `path` and fsync it, with mode and times of `like`. Returns its size and sha256."""
    parts = ((0, data),) if isinstance(data, bytes) else data.chunks()
    return write_copy((part for _, part in parts), path, like)


def write_copy(parts: Iterable[bytes], path: Path, like: Path | None = None) -> list[Any]:
    """Write the parts to a file. Returns their sha256; each is hashed while it is written and the next is made."""
    size = 0
    with path.open("xb", buffering=CHUNK) as file, BackgroundSha256() as digest:
        for part in parts:
            digest.update(part)
            file.write(part)
            size += len(part)
        file.flush()
        if like is not None:
            shutil.copystat(like, path)
            copy_owner(path, like)
        os.fsync(file.fileno())
        return [size, digest.hexdigest()]


def read_originals(base: Path, changes: ChangeSet) -> Iterator[bytes]:
    """Yield the original bytes of all ranges, a few MB at a time."""
    for name, ranges in changes.patched.items():
        with (base / name).open("rb", buffering=0) as file:
            parts, size = [], 0
            for begin, end in split_ranges(ranges):
                parts.append(read_range(file.fileno(), begin, end))
                if len(parts[-1]) != end - begin:
                    raise MergeError(f"{base / name}: ends before byte {end}; it became shorter meanwhile")
                size += end - begin
                if size >= CHUNK:
                    yield b"".join(parts)
                    parts, size = [], 0
            yield b"".join(parts)


def split_ranges(ranges: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield `(begin, end)` of all bytes of the ranges, a chunk at most at a time."""
    for offset, length in ranges.tolist():
        for begin in range(offset, offset + length, CHUNK):
            yield begin, min(begin + CHUNK, offset + length)


def encode_ranges(changes: ChangeSet) -> bytes:
    """Encode `ranges.npy`: (number of the patched file, offset, length) of every range, int64 [n, 3]."""
    parts = [np.insert(ranges, 0, number, axis=1) for number, ranges in enumerate(changes.patched.values())]
    np.save(file := BytesIO(), np.concatenate([np.empty((0, 3), np.int64), *parts]))
    return file.getvalue()
