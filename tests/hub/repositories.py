"""Repositories as on the Hub: immutable commits, and contents on disk under their SHA-256."""

import fnmatch
import hashlib
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from .answers import Refusal, no_revision

CHUNK = 1 << 20
LFS = [
    f"*.{end}"
    for end in ("safetensors", "bin", "pt", "pth", "h5", "msgpack", "onnx", "npz", "npy", "pkl", "zip", "model")
]
"""The patterns in a new repository's .gitattributes."""
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS).encode()


@dataclass(frozen=True)
class Blob:
    """One file of a commit, with its git oid, for LFS files that of the pointer."""

    sha256: str
    oid: str
    size: int
    lfs: bool

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256, self.size))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_oid(size: int, chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


class Store:
    """Contents on disk. With keep_lfs=False, LFS uploads are hashed and discarded."""

    def __init__(self, folder: Path, keep_lfs: bool = True) -> None:
        self.folder, self.keep_lfs = folder, keep_lfs
        self.sizes: dict[str, int] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def temporary(self) -> Path:
        return self.folder / f"tmp-{uuid.uuid4()}"

    def put(self, content: bytes | Path) -> tuple[str, int]:
        """Return SHA-256 and size."""
        digest, size, path = hashlib.sha256(), 0, self.temporary()
        with path.open("wb") as out:
            for chunk in [content] if isinstance(content, bytes) else _chunks(content):
                digest.update(chunk)
                size += out.write(chunk)
        self.adopt(path, digest.hexdigest(), size)
        return digest.hexdigest(), size

    def adopt(self, path: Path | None, sha256: str, size: int) -> None:
        """Adopt a finished file as content; None if it was discarded."""
        if path:
            path.replace(self.path(sha256))
        self.sizes[sha256] = size

    def blob(self, sha256: str, size: int, lfs: bool) -> Blob:
        if lfs:
            pointer = _pointer(sha256, size)
            return Blob(sha256, _git_oid(len(pointer), [pointer]), size, True)
        return Blob(sha256, _git_oid(size, _chunks(self.path(sha256))), size, False)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def is_lfs(path: str, size: int, threshold: int) -> bool:
    name = path.rsplit("/", maxsplit=1)[-1]
    return size > threshold or any(fnmatch.fnmatchcase(name, pattern) for pattern in LFS)


@dataclass(frozen=True)
class Commit:
    """A state of all files, with the id of its parent commit."""

    id: str
    parent: str | None
    title: str
    description: str
    files: Mapping[str, Blob]
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))


class Repository:
    """A repository. `refs` maps branches, "refs/tags/..." and "refs/pr/N" to commit ids."""

    def __init__(self, repo_id: str, store: Store, private: bool = False, gated: bool = False) -> None:
        self.id, self.private, self.gated = repo_id, private, gated
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lock = threading.RLock()
        self.attributes = store.blob(*store.put(ATTRIBUTES), lfs=False)
        self.refs["main"] = self._add(None, "initial commit", "", {".gitattributes": self.attributes}).id

    def at(self, revision: str) -> Commit:
        """Return the commit of a branch, tag, pull request or 40-digit id."""
        name = revision.removeprefix("refs/heads/")
        found = self.refs.get(name) or self.refs.get(f"refs/tags/{name}") or name
        if found not in self.commits:
            raise no_revision(revision)
        return self.commits[found]

    def commit(
        self, ref: str, title: str, changes: Mapping[str, Blob | None], description: str = "", parent: str | None = None
    ) -> Commit:
        """Commit changes (None: deleted) on a branch, which must still point to `parent`."""
        with self.lock:
            head = self.check_parent(ref, parent)
            files = {path: blob for path, blob in {**head.files, **changes}.items() if blob}
            made = self._add(head.id, title, description, files)
            self.refs[ref] = made.id
            return made

    def check_parent(self, ref: str, parent: str | None) -> Commit:
        """Return the commit of a branch, which must be `parent` if given."""
        head = self.at(ref)
        if ref not in self.refs:
            raise Refusal(400, f"{ref} is not a branch")
        if parent and not head.id.startswith(parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        return head

    def pull_request(self, start: str) -> int:
        """Create refs/pr/N at a commit and return N."""
        with self.lock:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in self.refs)
            self.refs[f"refs/pr/{number}"] = self.at(start).id
            return number

    def history(self, revision: str = "main") -> list[Commit]:
        """List commits, newest first."""
        found, now = [], self.at(revision)
        while True:
            found.append(now)
            if now.parent is None:
                return found
            now = self.commits[now.parent]

    def _add(self, parent: str | None, title: str, description: str, files: Mapping[str, Blob]) -> Commit:
        tree = sorted((path, blob.oid) for path, blob in files.items())
        seed = repr((self.id, len(self.commits), parent, title, description, tree))
        made = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, description, files)
        self.commits[made.id] = made
        return made
