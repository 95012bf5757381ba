"""SHA-256 of files, and of bytes while they are produced."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from pema_adapters.errors import reading
from pema_adapters.io.input_file import Bytes

CHUNK = 1 << 20


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits.

    Raises:
        FormatError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with reading(path), path.open("rb", buffering=0) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


class BackgroundSha256:
    """A SHA-256 computed by another thread, one update behind the caller.

    Use it as a context manager. Bytes passed to `update` must not change before the next `update` or `hexdigest`.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "BackgroundSha256":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._thread.shutdown()

    def update(self, data: Bytes) -> None:
        """Hash `data` in the background, after waiting for the previous call's."""
        self._wait()
        self._pending = self._thread.submit(self._digest.update, data)

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far, as 64 hex digits."""
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
