"""A folder of small cache entries, each stored with its checksum.

    cache = CacheFolder(Path("~/.cache/huggingface/pema").expanduser())
    cache.write("x", b"content")    # False if the folder cannot be written
    cache.read("x")                 # b"content"; None if the entry is missing or damaged

The cache is best-effort: no method raises on a failing disk.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pema_adapters.io.atomic_write import replace_file

DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class CacheFolder:
    """A folder of entries: each file is the SHA-256 of its content, then the content."""

    folder: Path

    def read(self, name: str) -> bytes | None:
        """Return the content of an entry, or None if it is missing, unreadable or damaged."""
        try:
            stored = (self.folder / name).read_bytes()
        except OSError:
            return None
        digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None

    def write(self, name: str, content: bytes) -> bool:
        """Write or replace an entry; return False if the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / name, hashlib.sha256(content).digest() + content)
        except OSError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove an entry if it exists and can be removed."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError:
            return
