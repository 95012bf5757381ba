"""The scan behind `pema-scan`: not done again for data and a tokenizer that were scanned before, even in part."""

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

FORMAT = 3  # of what is remembered: a scan that means something else gets another number
LIBRARIES = ("datasets", "tokenizers", "transformers")  # another version may read or tokenize otherwise
CACHE_NOTE = "the figures are those of an earlier scan of the same data, from {}; --no-cache scans again"


@dataclass(frozen=True)
class DataSource:
    """Data sets by the names that were given, loaded when they are needed."""

    names: tuple[str, ...]
    trust_remote_code: bool = False

    @cached_property
    def loaded(self) -> dict[str, Any]:
        """As `load_data` gives them."""
        return load_data(list(self.names), self.trust_remote_code)

    def compute_key(self, store: CacheFolder) -> list[Any] | None:
        """What tells whether it is the same data; None where nothing does."""
        try:
            found = [self._compute_name_key(name, store) for name in dict.fromkeys(self.names)]
        except OSError:  # loading it says why
            return None
        return None if None in found else found

    def _compute_name_key(self, name: str, store: CacheFolder) -> list[Any] | None:
        if Path(name).exists():
            return compute_path_key(Path(name), store)
        splits = {key: split for key, split in self.loaded.items() if key == name or key.startswith(f"{name} ")}
        found = [[key, get_dataset_key(split)] for key, split in splits.items()]
        return None if any(fingerprint is None for _, fingerprint in found) else found


def scan_with_cache(
    data: DataSource, encoder: Encoder, vocab_size: int, *, num_proc: int, use_cache: bool
) -> tuple[Scan, str]:
    """A scan, and where it comes from: empty if from the data themselves."""
    found = open_cache()
    identity = data.compute_key(found) if use_cache else None
    remembered = _open_scan_store(found, identity, encoder, vocab_size)
    if remembered is not None and (known := remembered.lookup()) is not None:
        return known, str(found.folder)
    scan = scan_text(data.loaded, encoder, vocab_size=vocab_size, num_proc=num_proc, resuming=remembered)
    if remembered is not None and data.compute_key(found) == identity:  # nobody changed it meanwhile
        remembered.save_result(scan)
    return scan, ""


def format_cache_note(source: str) -> str:
    """What to say of figures that come from the cache."""
    return CACHE_NOTE.format(source)


def open_cache() -> CacheFolder:
    """Where all of it is kept."""
    from huggingface_hub import constants

    return CacheFolder(Path(constants.HF_HOME) / "pema")


def _open_scan_store(store: CacheFolder, data: list[Any] | None, encoder: Encoder, vocab_size: int) -> ScanStore | None:
    """What is known of a scan; None where nothing tells whether it is the same."""
    tokenizer = compute_tokenizer_key(encoder.tokenizer) if data is not None else None
    if data is None or tokenizer is None:
        return None
    versions = [version(name) for name in LIBRARIES]
    settings = [encoder.text_columns, encoder.max_length, vocab_size, encoder.batch_rows]
    return ScanStore(store, hash_json([FORMAT, versions, data, tokenizer, settings]))
