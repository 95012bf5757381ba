"""The routes of contents: resolve, large files, and their upload."""

import math
import re
from typing import Any
from urllib.parse import quote

from .answers import Answer, Refusal, gated, no_entry
from .repositories import Blob, Repository
from .routing import Call, route

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@route("GET HEAD", "/{id}/resolve/{revision}/{path}")
def resolve(call: Call, id: str, revision: str, path: str) -> Answer:
    """Answer with a small file itself, or redirect to the address of a large one, which needs no token."""
    repository = call.readable(id)
    commit = repository.at(revision)
    _pass_gate(call, repository)
    if path not in commit.files:
        raise no_entry(commit.id)
    blob = commit.files[path]
    call.log.repo, call.log.file = id, path
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{blob.oid}"'}
    if not blob.lfs:
        return _content(call, blob, headers)
    headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
    place = f"{call.hub.url}/cdn/{blob.sha256}/{quote(id, safe='')}/{quote(path)}"
    return Answer(302, headers={**headers, "Location": place})


def _pass_gate(call: Call, repository: Repository) -> None:
    account = call.account
    if repository.gated and not (account and (account.owns(repository.id) or repository.id in account.granted)):
        raise gated(repository.id, account)


@route("GET HEAD", "/cdn/{sha256}/{name}/{path}")
def cdn(call: Call, sha256: str, name: str, path: str) -> Answer:
    """Answer with a large file."""
    call.log.repo, call.log.file = name, path
    size = call.hub.store.sizes[sha256]
    return _content(call, Blob(sha256, sha256, size, lfs=True), {"ETag": f'"{sha256}"'})


def _content(call: Call, blob: Blob, headers: dict[str, str]) -> Answer:
    answer = Answer(200, headers=headers, file=call.hub.store.path(blob.sha256), length=blob.size)
    answer.headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    found = _RANGE.fullmatch(call.log.headers.get("range", ""))
    if not found:
        return answer
    first, last = found.groups()
    start = int(first) if first else max(0, blob.size - int(last))
    end = min(int(last), blob.size - 1) if first and last else blob.size - 1
    if start > end:
        raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{blob.size}")
    answer.status, answer.start, answer.length = 206, start, end - start + 1
    answer.headers["Content-Range"] = f"bytes {start}-{end}/{blob.size}"
    return answer


@route("POST", "/{id}.git/info/lfs/objects/batch")
def batch(call: Call, id: str) -> Answer:
    """Answer what to do with each object: nothing if it is stored, else upload it, at once or in parts."""
    wanted = call.json()
    call.writable(id, by_pull_request="ref" not in wanted)
    objects = [_instructions(call, id, one["oid"], one["size"]) for one in wanted["objects"]]
    parts = any("chunk_size" in one.get("actions", {}).get("upload", {}).get("header", {}) for one in objects)
    return Answer.of({"transfer": "multipart" if parts else "basic", "objects": objects})


def _instructions(call: Call, repo_id: str, oid: str, size: int) -> dict[str, Any]:
    url, store, chunk = call.hub.url, call.hub.store, call.hub.chunk_size
    if oid in store.sizes:
        return {"oid": oid, "size": size}
    upload: dict[str, Any] = {"href": f"{url}/upload/{oid}/{size}", "header": {}}
    if chunk and size > chunk:
        name = call.hub.uploads.begin(oid, size)
        count = math.ceil(size / chunk)
        urls = {f"{number:05}": f"{url}/upload-part/{name}/{number}" for number in range(1, count + 1)}
        upload = {"href": f"{url}/upload-complete/{name}", "header": {"chunk_size": str(chunk), **urls}}
    verify = {"href": f"{url}/{repo_id}.git/info/lfs/objects/verify", "header": {}}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


@route("PUT", "/upload/{oid}/{size}")
def upload(call: Call, oid: str, size: str) -> Answer:
    """Store a whole file."""
    call.hub.uploads.put(oid, int(size), call.body.chunks())
    return Answer(200)


@route("PUT", "/upload-part/{name}/{number}")
def upload_part(call: Call, name: str, number: str) -> Answer:
    """Store a part of a file."""
    return Answer(200, headers={"ETag": call.hub.uploads.put_part(name, int(number), call.body.chunks())})


@route("POST", "/upload-complete/{name}")
def upload_complete(call: Call, name: str) -> Answer:
    """Complete an upload in parts."""
    done = call.json()
    call.hub.uploads.complete(name, done["oid"], done["parts"])
    return Answer.of({"success": True})


@route("POST", "/{id}.git/info/lfs/objects/verify")
def verify(call: Call, id: str) -> Answer:
    """Verify that the object arrived."""
    call.readable(id)
    wanted = call.json()
    if call.hub.store.sizes.get(wanted["oid"]) != wanted["size"]:
        raise Refusal(404, "the object is not here")
    return Answer.of({})
