"""The server: a `Hub` on a local port, the methods that tests call, and its HTTP handler."""

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from . import api  # noqa: F401 - the routes
from .answers import Account, Answer, Dropped, Refusal
from .faults import Fault, Faults, Request
from .repositories import CHUNK, Blob, Commit, Repository, Store, is_lfs
from .routing import Body, Call, answer
from .uploads import Uploads

UNSET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE",
         "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_HUB_ENABLE_HF_TRANSFER", "HF_ASSETS_CACHE", "HF_XET_CACHE")  # fmt: skip
"""Environment variables that would direct the client elsewhere."""


class Hub:
    """A Hub on 127.0.0.1, used as a context manager; its contents are deleted when it stops.

    folder: where contents are kept. chunk_size: larger files are uploaded in parts of so many bytes. lfs_threshold:
    larger ones go by LFS whatever their name. keep_lfs: False to hash what is uploaded by LFS and throw it away.
    page_size: so many entries of a tree come at once. crashes: errors of the server itself.

    tokens: who the tokens belong to; "hf_good" belongs to "someone", who writes to someone/* and team/*.
    """

    def __init__(
        self,
        folder: Path,
        *,
        chunk_size: int | None = None,
        lfs_threshold: int = 10_000_000,
        keep_lfs: bool = True,
        page_size: int = 1000,
    ) -> None:
        self.chunk_size, self.lfs_threshold, self.page_size = chunk_size, lfs_threshold, page_size
        self.tokens = {"hf_good": Account("someone", orgs=("team",))}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.crashes: list[BaseException | None] = []
        self.faults = Faults()
        self.store = Store(folder, keep_lfs)
        self.uploads = Uploads(self.store)
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self.store.close()

    def stop(self) -> None:
        """Cut the network: close the port and every connection."""
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_all()

    def environment(self, home: Path) -> dict[str, str]:
        """Return environment variables that point a process's client to this Hub, with its files in `home`."""
        kept = {name: value for name, value in os.environ.items() if name not in UNSET}
        return {**kept, **self.variables(home)}

    def variables(self, home: Path) -> dict[str, str]:
        """Return those of `environment` that are set."""
        on = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        local = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), **dict.fromkeys(on, "1"), **local}

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repository:
        """Create a repository with only .gitattributes."""
        self.repositories[repo_id] = Repository(repo_id, self.store, private, gated)
        return self.repositories[repo_id]

    def publish(
        self,
        repo_id: str,
        contents: Path | Mapping[str, bytes | Path],
        *,
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
    ) -> str:
        """Commit exactly these files directly, creating repository and branch as needed; return the commit id."""
        if repo_id not in self.repositories:
            self.create(repo_id, private=private, gated=gated)
        repository = self.repositories[repo_id]
        repository.refs.setdefault(revision, repository.refs["main"])
        found = contents if isinstance(contents, Mapping) else _files_below(Path(contents))
        gone: dict[str, Blob | None] = dict.fromkeys(set(repository.at(revision).files) - {".gitattributes"})
        added = {name: self._blob(name, content) for name, content in found.items()}
        return repository.commit(revision, "published", {**gone, **added}).id

    def _blob(self, name: str, content: bytes | Path) -> Blob:
        sha256, size = self.store.put(content)
        return self.store.blob(sha256, size, is_lfs(name, size, self.lfs_threshold))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return all files; .gitattributes only if it was changed."""
        repository = self.repositories[repo_id]
        found = repository.at(revision).files.items()
        return {
            name: self.store.path(blob.sha256).read_bytes() for name, blob in found if blob != repository.attributes
        }

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """List commits, newest first, down to the initial one."""
        return self.repositories[repo_id].history(revision)

    def fail(self, match: str, **fault: Any) -> None:
        """Inject a fault into requests whose "METHOD /path" matches the pattern; see `Fault` for the keywords."""
        self.faults.add(Fault(match, **fault))

    def downloaded(self, repo_id: str) -> list[str]:
        """Return the downloaded files, sorted, once for each download."""
        bodies = (one for one in self.requests if one.method == "GET" and one.repo == repo_id and one.status != 302)
        return sorted(str(one.file) for one in bodies)

    def asked(self, match: str) -> list[Request]:
        """Return the requests whose "METHOD /path" contains the text."""
        return [one for one in self.requests if match in str(one)]


def _files_below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect; record anything else as an error of this server."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.hub.crashes.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        hub = self.server.hub
        log = Request.of(self.command, self.path, dict(self.headers.items()))
        hub.requests.append(log)
        fault = hub.faults.take(log)
        cut = fault.after_bytes if fault else None
        body = Body(
            self.rfile, int(self.headers.get("Content-Length") or 0), log, None if self.command == "GET" else cut
        )
        try:
            self._send(self._answer(body, log, fault), log, cut)
        except Dropped:
            self._reset()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _answer(self, body: Body, log: Request, fault: Fault | None) -> Answer:
        try:
            if fault and fault.status:
                raise fault.refusal
            found = (fault and fault.answer()) or answer(Call.of(self.server.hub, log, self.path, body))
        except Refusal as refusal:
            found = refusal.answer
        body.drain()
        return found

    def _send(self, found: Answer, log: Request, cut: int | None) -> None:
        log.status = found.status
        self.send_response(found.status)
        for name, value in {**found.headers, "Content-Length": str(found.size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = found.size if cut is None else min(cut, found.size)
        if cut is not None:
            self.close_connection = True
        if found.file is None:
            log.sent += left
            self.wfile.write(found.body[:left])
            return
        with found.file.open("rb") as file:
            file.seek(found.start)
            while left and (chunk := file.read(min(CHUNK, left))):
                log.sent += len(chunk)
                left -= len(chunk)
                self.wfile.write(chunk)

    def _reset(self) -> None:
        """Cut the connection so that the client notices at once, even while sending."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def log_message(self, format: str, *args: Any) -> None:
        pass
