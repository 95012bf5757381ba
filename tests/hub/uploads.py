"""Uploads of large files, hashed as they arrive and never held in memory as a whole."""

import hashlib
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .answers import Refusal
from .repositories import CHUNK, Store


@dataclass
class _Multipart:
    """An upload. `hashes` has the state after each part, so that a part may be sent again."""

    oid: str
    size: int
    hashes: list[Any] = field(default_factory=lambda: [hashlib.sha256()])
    etags: list[str] = field(default_factory=list)
    parts: list[Path] = field(default_factory=list)


class Uploads:
    """Uploads, at once or in parts that come in order; they are accepted only if size and SHA-256 are right."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[str, _Multipart] = {}

    def put(self, oid: str, size: int, body: Iterator[bytes]) -> None:
        digest = hashlib.sha256()
        path, received = self._receive(body, digest)
        if (digest.hexdigest(), received) != (oid, size):
            raise Refusal(400, f"BadDigest: {received} bytes of {digest.hexdigest()}, expected {size} of {oid}")
        self._store.adopt(path, oid, size)

    def begin(self, oid: str, size: int) -> str:
        """Start an upload in parts and return its id."""
        name = uuid.uuid4().hex
        self._open[name] = _Multipart(oid, size)
        return name

    def put_part(self, name: str, number: int, body: Iterator[bytes]) -> str:
        """Store a part, counted from 1, and return its ETag."""
        upload = self._open[name]
        if number > len(upload.etags) + 1:
            raise Refusal(
                400, f"part {number} came before part {len(upload.etags) + 1}; this server wants them in order"
            )
        digest = upload.hashes[number - 1].copy()
        path, received = self._receive(body, digest)
        etag = f'"{number}-{received}-{digest.hexdigest()[:16]}"'
        upload.hashes[number:], upload.etags[number - 1 :] = [digest], [etag]
        upload.parts[number - 1 :] = [path] if path else []
        return etag

    def complete(self, name: str, oid: str, parts: list[dict[str, Any]]) -> None:
        upload = self._open[name]
        named = [(part["partNumber"], part["etag"]) for part in parts]
        if oid != upload.oid or named != list(enumerate(upload.etags, 1)):
            raise Refusal(400, "InvalidPart: the parts named are not those that were put")
        if upload.hashes[-1].hexdigest() != oid:
            raise Refusal(400, f"BadDigest: the parts make {upload.hashes[-1].hexdigest()}, expected {oid}")
        self._store.adopt(_joined(upload.parts), oid, upload.size)
        del self._open[name]

    def _receive(self, body: Iterator[bytes], digest: Any) -> tuple[Path | None, int]:
        path, size = self._store.temporary() if self._store.keep_lfs else None, 0
        try:
            with path.open("wb") if path else open("/dev/null", "wb") as out:  # noqa: PTH123
                for chunk in body:
                    digest.update(chunk)
                    size += out.write(chunk)
        except BaseException:
            if path:
                path.unlink()
            raise
        return path, size


def _joined(parts: list[Path]) -> Path | None:
    """Append all other parts to the first and return it."""
    for part in parts[1:]:
        with parts[0].open("ab") as out, part.open("rb") as file:
            shutil.copyfileobj(file, out, CHUNK)
        part.unlink()
    return parts[0] if parts else None
