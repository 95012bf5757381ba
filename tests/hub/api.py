"""The routes below /api: repositories, their contents, and commits."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from . import lfs  # noqa: F401 - its routes
from .answers import Answer, Refusal, no_entry, no_rights, not_logged_in
from .repositories import Blob, Commit, is_lfs
from .routing import Call, route

_FRONT = re.compile(r"^---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    """Answer whose token it is."""
    if (account := call.account) is None:
        raise not_logged_in(repository=False)
    token = {"displayName": "test", "role": "write" if account.write else "read"}
    orgs = [{"type": "org", "name": name} for name in account.orgs]
    auth = {"type": "access_token", "accessToken": token}
    return Answer.of({"type": "user", "id": "0", "name": account.user, "fullname": "", "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create(call: Call) -> Answer:
    """Create a repository; 409 if it exists, which the client takes for success with exist_ok."""
    account, wanted = call.account, call.json()
    if account is None:
        raise not_logged_in(repository=False)
    repo_id = f"{wanted.get('organization') or account.user}/{wanted['name']}"
    url = f"{call.hub.url}/{repo_id}"
    if repo_id in call.hub.repositories and account.owns(repo_id):
        return Answer.of({"error": "You already created this model repo", "url": url}, 409)
    if not account.write or not account.owns(repo_id):
        raise no_rights(repo_id)
    call.hub.create(repo_id, private=bool(wanted.get("private")))
    return Answer.of({"url": url, "name": repo_id})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    """Validate a card: JSON from `HfApi.create_commit`, a form from `ModelCard.validate`."""
    form = "form" in call.content_type
    text = call.form()["content"][0] if form else call.json()["content"]
    try:
        metadata = _metadata(text)
    except ValueError as error:
        errors = {"errors": [{"message": str(error)}], "warnings": []}
        return Answer(400, str(error).encode()) if form else Answer.of(errors, 400)
    warning = {"message": "empty or missing yaml metadata in repo card"}
    return Answer.of({"errors": [], "warnings": [] if metadata else [warning]})


def _metadata(text: str) -> dict[str, Any]:
    found = _FRONT.match(text)
    try:
        metadata = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise ValueError(f"YAML metadata cannot be read: {error}") from error
    if not isinstance(metadata or {}, dict):
        raise ValueError("YAML metadata is no mapping")
    return metadata or {}


@route("GET", "/api/models/{id}/tree/{revision}")
@route("GET", "/api/models/{id}/tree/{revision}/{path}")
def tree(call: Call, id: str, revision: str, path: str = "") -> Answer:
    """List files and folders, in pages that the header Link chains."""
    commit = call.readable(id).at(revision)
    below = f"{path}/" if path else ""
    entries = list(_entries(commit, below, call.query.get("recursive", "").lower() in ("true", "1")))
    if not entries and path:
        raise no_entry(commit.id)
    start, size = int(call.query.get("cursor", 0)), call.hub.page_size
    answer = Answer.of(entries[start : start + size], X_Repo_Commit=commit.id)
    if start + size < len(entries):
        query = f"recursive={call.query.get('recursive', 'False')}&cursor={start + size}"
        answer.headers["Link"] = f'<{call.hub.url}{call.target}?{query}>; rel="next"'
    return answer


def _entries(commit: Commit, below: str, recursive: bool) -> Iterator[dict[str, Any]]:
    seen = set()
    for path, blob in sorted(commit.files.items()):
        parts = path.removeprefix(below).split("/")
        if not path.startswith(below):
            continue
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            if (folder := below + "/".join(parts[:depth])) not in seen:
                seen.add(folder)
                yield {"type": "directory", "oid": commit.id, "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            yield _entry(path, blob)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    large = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}} if blob.lfs else {}
    return {"type": "file", "oid": blob.oid, "size": blob.size, "path": path, **large}


@route("POST", "/api/models/{id}/paths-info/{revision}")
def paths_info(call: Call, id: str, revision: str) -> Answer:
    """List those of the given paths that exist."""
    commit, paths = call.readable(id).at(revision), call.form().get("paths", [])
    return Answer.of([_entry(path, commit.files[path]) for path in paths if path in commit.files])


@route("GET", "/api/models/{id}/refs")
def refs(call: Call, id: str) -> Answer:
    """List branches, tags and, on request, pull requests."""
    found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for ref, commit in call.readable(id).refs.items():
        kind = {"refs/tags/": "tags", "refs/pr/": "pullRequests"}.get(ref[: ref.rfind("/") + 1], "branches")
        full = ref if ref.startswith("refs/") else f"refs/heads/{ref}"
        name = ref.removeprefix("refs/tags/").removeprefix("refs/pr/")
        found[kind].append({"name": name, "ref": full, "targetCommit": commit})
    return Answer.of(found)


@route("GET", "/api/models/{id}/commits/{revision}")
def commits(call: Call, id: str, revision: str) -> Answer:
    """List commits, newest first."""
    keys = [
        {"id": one.id, "title": one.title, "message": one.description, "authors": [], "date": _date(one)}
        for one in call.readable(id).history(revision)
    ]
    return Answer.of(keys)


@route("POST", "/api/models/{id}/branch/{name}")
def branch(call: Call, id: str, name: str) -> Answer:
    """Create a branch at `startingPoint`, else at main."""
    repository = call.writable(id)
    if name in repository.refs:
        raise Refusal(409, f"Reference already exists: {name}")
    repository.refs[name] = repository.at((call.json() or {}).get("startingPoint") or "main").id
    return Answer.of({})


@route("POST", "/api/models/{id}/preupload/{revision}")
def preupload(call: Call, id: str, revision: str) -> Answer:
    """Answer which files to upload by LFS, and what is stored under their names already."""
    by_pull_request = "create_pr" in call.query
    commit = call.writable(id, by_pull_request=by_pull_request).at(revision)
    found = []
    for file in call.json()["files"]:
        large = is_lfs(file["path"], file["size"], call.hub.lfs_threshold)
        there = commit.files.get(file["path"])
        oid = {"oid": there.etag} if there else {}
        mode = "lfs" if large else "regular"
        found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
    return Answer.of({"files": found, "commitOid": commit.id})


@route("POST", "/api/models/{id}/commit/{revision}")
def commit(call: Call, id: str, revision: str) -> Answer:
    """Commit lines of JSON, the header first; nothing is changed before all are valid."""
    by_pull_request = "create_pr" in call.query
    repository = call.writable(id, by_pull_request=by_pull_request)
    lines = ((line["key"], line["value"]) for line in map(json.loads, call.body.lines()))
    _, header = next(lines)
    parent, ref, more = header.get("parentCommit"), revision, {}
    with repository.lock:
        if not by_pull_request:
            repository.check_parent(ref, parent)
        base = repository.at((by_pull_request and parent) or revision)
        changes = {path: blob for key, value in lines for path, blob in _change(call, base, key, value).items()}
        if by_pull_request:
            number = repository.pull_request(parent or revision)
            parent, ref = None, f"refs/pr/{number}"
            more = {"pullRequestUrl": f"{call.hub.url}/{id}/discussions/{number}"}
        made = repository.commit(ref, header["summary"], changes, header.get("description", ""), parent)
    url = f"{call.hub.url}/{id}/commit/{made.id}"
    return Answer.of({"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": "", **more})


def _change(call: Call, base: Commit, key: str, value: dict[str, Any]) -> Mapping[str, Blob | None]:
    store, path = call.hub.store, value["path"]
    if key == "file":
        return {path: store.blob(*store.put(base64.b64decode(value["content"])), lfs=False)}
    if key == "lfsFile":
        if value["oid"] not in store.sizes:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
        return {path: store.blob(value["oid"], store.sizes[value["oid"]], lfs=True)}
    gone = [name for name in base.files if name == path or (key == "deletedFolder" and name.startswith(path))]
    if not gone:
        raise no_entry(base.id, f'A file with this name doesn\'t exist: "{path}"')
    return dict.fromkeys(gone)


@route("GET", "/api/models/{id}/revision/{revision}")
@route("GET", "/api/models/{id}")
def info(call: Call, id: str, revision: str = "main") -> Answer:
    """Answer for gated repositories too: only their files are withheld."""
    repository = call.readable(id)
    commit = repository.at(revision)
    siblings = [_sibling(path, blob, "blobs" in call.query) for path, blob in sorted(commit.files.items())]
    facts = {"private": repository.private, "gated": "auto" if repository.gated else False, "disabled": False}
    found = {
        "id": id,
        "modelId": id,
        "author": id.split("/", maxsplit=1)[0],
        "sha": commit.id,
        "lastModified": _date(commit),
    }
    more = {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
    return Answer.of({**found, **facts, **more, **_card(call, commit)})


def _card(call: Call, commit: Commit) -> dict[str, Any]:
    if "README.md" not in commit.files:
        return {}
    try:
        return {"cardData": _metadata(call.hub.store.path(commit.files["README.md"].sha256).read_text("utf-8"))}
    except ValueError:
        return {}


def _sibling(path: str, blob: Blob, sizes: bool) -> dict[str, Any]:
    if not sizes:
        return {"rfilename": path}
    large = {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}} if blob.lfs else {}
    return {"rfilename": path, "blobId": blob.oid, "size": blob.size, **large}


def _date(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
