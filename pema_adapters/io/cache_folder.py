"""Small files in a folder of the user's cache: whole or not there at all, whatever happens to them.

store = Store(Path("~/.cache/huggingface/pema").expanduser())
store.write("x", b"content")    # False where the folder cannot be written
store.read("x")                 # b"content"; None: nothing there, or damaged
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pema_adapters.io.atomic_write import replace_file

DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class CacheFolder:
    """A folder of entries, each with a sum of its content before it."""

    folder: Path

    def read(self, name: str) -> bytes | None:
        """What was written under a name; None where that cannot be had back as it was."""
        try:
            content = (self.folder / name).read_bytes()
        except OSError:
            return None
        return content[DIGEST:] if hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST] else None

    def write(self, name: str, content: bytes) -> bool:
        """Write or replace an entry; False where the folder cannot be written: a cache is no must."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / name, hashlib.sha256(content).digest() + content)
        except OSError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove an entry, if it is there and can be."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError:
            return
