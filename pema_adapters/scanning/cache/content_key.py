"""Compute cache keys for data and tokenizers from their content, not from their names.

The content of a file is hashed once. After that its size, inode and times identify it until one of them changes.
"""

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from pema_adapters.io.cache_folder import CacheFolder
from pema_adapters.io.digest import sha256_file

CLOCK_TICK_NS = 2e9  # a file changed within a tick of the file system's clock may change again and keep its time


def compute_path_key(path: Path, store: CacheFolder) -> list[Any]:
    """Return the names and hashes of a file, or of all files below a folder except hidden ones.

    Args:
        path: the file or folder. A file is known by its suffixes, not by its name.
        store: keeps the hashes of files.

    Raises:
        OSError: a file cannot be read.
    """
    if path.is_file():
        return [["".join(path.suffixes[-2:]), _hash_file(path, store)]]
    return [[name, _hash_file(path / name, store)] for name in _list_files(path)]


def read_folder_state(folder: Path) -> list[list[str]] | None:
    """Return the names and states of the files of a folder (or of one file), without reading them.

    Returns:
        None if a file is so new that it may change again and keep its time.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(path for path in (folder.iterdir() if folder.is_dir() else [folder]) if path.is_file())
    if any(_is_recent(path) for path in files):
        return None
    return [[str(path.resolve()), _read_file_state(path)] for path in files]


def get_dataset_key(split: Any) -> str | None:
    """Return the fingerprint of a `datasets.Dataset`; None for a stream, which has none."""
    fingerprint = getattr(split, "_fingerprint", None)  # a private name, but the key of the cache of `datasets`
    return fingerprint if isinstance(fingerprint, str) else None


def compute_tokenizer_key(tokenizer: Any) -> str | None:
    """Return the hash of everything on which a tokenizer's ids depend.

    Returns:
        None for classes outside of transformers, whose code may do anything, and for parts that cannot be saved.
    """
    tokenizer_class = type(tokenizer)
    if not tokenizer_class.__module__.startswith("transformers."):
        return None
    settings = [tokenizer_class.__qualname__, tokenizer.truncation_side, tokenizer.split_special_tokens]
    try:
        content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else _hash_saved_files(tokenizer)
    except Exception:  # tokenizers raises no narrower class for parts written in Python, which cannot be saved
        return None
    return hash_json([*settings, content])


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _list_files(folder: Path) -> list[str]:
    below = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))


def _hash_saved_files(tokenizer: Any) -> list[list[str]]:
    """Hash the files that a tokenizer written in Python saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return [[name, sha256_file(Path(folder, name))] for name in _list_files(Path(folder))]


def _hash_file(path: Path, store: CacheFolder) -> str:
    """Return the SHA-256 of a file; read the file only if its state differs from that in the store."""
    entry = f"file-{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}"
    state = _read_file_state(path)
    stored = store.read(entry)
    if stored is not None and (lines := stored.decode().split("\n")) and lines[0] == state:
        return lines[1]
    digest = sha256_file(path)
    if _read_file_state(path) == state and not _is_recent(path):
        store.write(entry, f"{state}\n{digest}".encode())
    return digest


def _is_recent(path: Path) -> bool:
    return path.stat().st_mtime_ns >= time.time_ns() - CLOCK_TICK_NS


def _read_file_state(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"
