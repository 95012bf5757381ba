"""The scan of `pema-scan`: reuses earlier results for the same data and tokenizer, and resumes interrupted scans."""

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pema_adapters.io.cache_folder import CacheFolder
from pema_adapters.scanning.cache.content_key import (
    compute_path_key,
    compute_tokenizer_key,
    get_dataset_key,
    hash_json,
)
from pema_adapters.scanning.cache.scan_store import ScanStore
from pema_adapters.scanning.data_files import load_data
from pema_adapters.scanning.scanner import Scan
from pema_adapters.scanning.text_columns import Encoder
from pema_adapters.scanning.text_scanner import scan_text

FORMAT = 3  # of the entries; raise it when the meaning of a scan changes
LIBRARIES = ("datasets", "tokenizers", "transformers")  # another version may read or tokenize differently
CACHE_NOTE = "the figures are those of an earlier scan of the same data, from {}; --no-cache scans again"


@dataclass(frozen=True)
class DataSource:
    """Data sets by name, loaded at first use.

    Args:
        names: as for `load_data`.
        trust_remote_code: as for `load_data`.
    """

    names: tuple[str, ...]
    trust_remote_code: bool = False

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """The data sets, as `load_data` returns them."""
        return load_data(list(self.names), self.trust_remote_code)

    def compute_key(self, store: CacheFolder) -> list[Any] | None:
        """Return a key of the content; None if the data have none, or cannot be read."""
        try:
            keys = [self._compute_name_key(name, store) for name in dict.fromkeys(self.names)]
        except OSError:  # loading the data raises the error for the user
            return None
        return None if None in keys else keys

    def _compute_name_key(self, name: str, store: CacheFolder) -> list[Any] | None:
        if Path(name).exists():
            return compute_path_key(Path(name), store)
        splits = {key: split for key, split in self.loaded.items() if key == name or key.startswith(f"{name} ")}
        keys = [[key, get_dataset_key(split)] for key, split in splits.items()]
        return None if any(fingerprint is None for _, fingerprint in keys) else keys


def scan_with_cache(
    data: DataSource, encoder: Encoder, vocab_size: int, *, num_proc: int, use_cache: bool
) -> tuple[Scan, str]:
    """Scan text, or return the stored result of the same scan.

    Args:
        data: the data.
        encoder: the tokenizer, the columns of text, and the maximum length.
        vocab_size: V.
        num_proc: as for `scan_text`.
        use_cache: False to scan in any case, and store nothing.

    Returns:
        The scan, and the folder of the cache it comes from; "" if the data were scanned.
    """
    cache = open_cache()
    data_key = data.compute_key(cache) if use_cache else None
    scan_store = _open_scan_store(cache, data_key, encoder, vocab_size)
    if scan_store is not None and (stored := scan_store.lookup()) is not None:
        return stored, str(cache.folder)
    scan = scan_text(data.loaded, encoder, vocab_size=vocab_size, num_proc=num_proc, resume_store=scan_store)
    if scan_store is not None and data.compute_key(cache) == data_key:  # the data did not change during the scan
        scan_store.save_result(scan)
    return scan, ""


def format_cache_note(folder: str) -> str:
    """Return the note on a result from the cache."""
    return CACHE_NOTE.format(folder)


def open_cache() -> CacheFolder:
    """Return the cache of `pema-scan`, a folder in HF_HOME."""
    from huggingface_hub import constants

    return CacheFolder(Path(constants.HF_HOME) / "pema")


def _open_scan_store(
    cache: CacheFolder, data_key: list[Any] | None, encoder: Encoder, vocab_size: int
) -> ScanStore | None:
    """Return the store of a scan; None if the data or the tokenizer have no key."""
    tokenizer_key = compute_tokenizer_key(encoder.tokenizer) if data_key is not None else None
    if data_key is None or tokenizer_key is None:
        return None
    versions = [version(name) for name in LIBRARIES]
    settings = [encoder.text_columns, encoder.max_length, vocab_size, encoder.batch_rows]
    return ScanStore(cache, hash_json([FORMAT, versions, data_key, tokenizer_key, settings]))
