"""Telling whether data and a tokenizer are the same as before: by their content, not by their names.

The content of a file is read once; after that its size, inode and time of change stand for it, while they stay.
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

CLOCK_TICK_NS = 2e9  # nanoseconds: a file may change again within one tick of its clock, and keep its time


def compute_path_key(path: Path, store: CacheFolder) -> list[Any]:
    """Names and content of a file, or of all files below a folder but hidden ones.

    Raises:
        OSError: one cannot be read.
    """
    if path.is_file():
        return [["".join(path.suffixes[-2:]), _hash_file(path, store)]]
    return [[name, _hash_file(path / name, store)] for name in _list_files(path)]


def read_folder_state(folder: Path) -> list[list[str]] | None:
    """Names and states of the files of a folder (or of one file); None where one may change again unnoticed.

    Raises:
        OSError: one cannot be read.
    """
    files = sorted(path for path in (folder.iterdir() if folder.is_dir() else [folder]) if path.is_file())
    if any(path.stat().st_mtime_ns >= time.time_ns() - CLOCK_TICK_NS for path in files):
        return None
    return [[str(path.resolve()), _read_file_state(path)] for path in files]


def _list_files(folder: Path) -> list[str]:
    below = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))


def get_dataset_key(split: Any) -> str | None:
    """The fingerprint by which `datasets` itself knows a `Dataset`; None for a stream, which may give what it likes."""
    fingerprint = getattr(split, "_fingerprint", None)  # the name is private, the thing is what its own cache goes by
    return fingerprint if isinstance(fingerprint, str) else None


def compute_tokenizer_key(tokenizer: Any) -> str | None:
    """A sum of all that makes its ids; None for classes that are not of transformers, which may do anything."""
    kind = type(tokenizer)
    if not kind.__module__.startswith("transformers."):
        return None
    settings = [kind.__qualname__, tokenizer.truncation_side, tokenizer.split_special_tokens]
    try:
        made_of = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else _hash_saved_files(tokenizer)
    except Exception:  # parts written in Python cannot be saved; tokenizers has no narrower class for it
        return None
    return hash_json([*settings, made_of])


def _hash_saved_files(tokenizer: Any) -> list[list[str]]:
    """A tokenizer in Python: the content of the files that it saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return [[name, sha256_file(Path(folder, name))] for name in _list_files(Path(folder))]


def hash_json(value: Any) -> str:
    """The SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path, store: CacheFolder) -> str:
    """The SHA-256 of a file, read only where the file is not known as it is."""
    entry = f"file-{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}"
    state = _read_file_state(path)
    known = store.read(entry)
    if known is not None and (found := known.decode().split("\n")) and found[0] == state:
        return found[1]
    content = sha256_file(path)
    if _read_file_state(path) == state and path.stat().st_mtime_ns < time.time_ns() - CLOCK_TICK_NS:
        store.write(entry, f"{state}\n{content}".encode())
    return content


def _read_file_state(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"
