"""Download a base or a delta from the Hub, and return its snapshot folder in the local cache.

Only what a merge needs is downloaded: the weights, in one format, and the small files beside them. All files are of one
commit. If the Hub cannot be reached, a complete copy in the cache is used.
"""

import fnmatch
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pema_adapters.errors import FormatError, MergeError, PemaError
from pema_adapters.formats.adapter_config import ADAPTER_CONFIG
from pema_adapters.formats.checkpoint import CONFIG
from pema_adapters.formats.delta import ADAPTER_WEIGHTS, HEAD_CONFIG, HEAD_WEIGHTS
from pema_adapters.formats.delta_discovery import MERGE_MANIFEST
from pema_adapters.formats.json_object import read_json
from pema_adapters.formats.modules_json import MODULES, read_module_paths
from pema_adapters.formats.weights import INDEX, PICKLE, PICKLE_INDEX, SINGLE, find_weight_files
from pema_adapters.hub.errors import explain, is_unreachable
from pema_adapters.hub.retry import with_retry
from pema_adapters.hub.token import check_token
from pema_adapters.io.atomic_write import replace_file
from pema_adapters.io.safe_paths import is_plain_name

Fetch = Callable[[str], Path]
"""Downloads a file of the repository unless it is cached, and returns its path."""
SelectFiles = Callable[[Collection[str], Fetch], list[str]]
"""Selects the files that a merge needs from all file names; may fetch an index to do so."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.py", "*.md", "*.jinja", "LICENSE*", "vocab*", "merges*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INTERFACE, _CARD = "adapter_interface.json", "README.md"


@dataclass(frozen=True)
class _Repository:
    """A repository to download as a `kind`, "base" or "delta"."""

    kind: str
    name: str
    revision: str | None
    token: str | bool | None

    def __post_init__(self) -> None:
        if not HUB_ID.fullmatch(self.name):
            raise MergeError(f"{self.kind} {self.name}: no such folder, and not a Hub id")


def download_base(name: str, revision: str | None, token: str | bool | None = None) -> Path:
    """Download a base: its weights, safetensors rather than pickles, and the small files beside them.

    The Hub is asked even if the cache has the weights: a cache that `from_pretrained` filled lacks the tokenizer.

    Args:
        name: The repository's id.
        revision: Branch, tag or commit; None for the main branch.
        token: See `check_token`.

    Returns:
        The snapshot folder.

    Raises:
        MergeError: `name` is not a Hub id, or the repository cannot be downloaded or holds no weights.
    """
    return _download(_Repository("base", name, revision, token), _select_base_files, _find_cached_base)


def download_delta(name: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Download a delta, which is at the top of the repository or one level below; see `download_base`.

    Returns:
        The snapshot folder, in which `find_delta` finds the delta.
    """
    return _download(_Repository("delta", name, revision, token), _select_delta_files, _find_cached_delta)


def _find_cached_base(repository: _Repository) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in (SINGLE, INDEX, PICKLE, PICKLE_INDEX):
        try:
            found = try_to_load_from_cache(repository.name, file, revision=repository.revision)
        except HFValidationError:  # the download reports it
            return None
        if isinstance(found, str):
            folder = Path(found).parent
            return folder if _is_complete(folder) else None
    return None


def _is_complete(folder: Path) -> bool:
    try:
        find_weight_files(folder)
    except FormatError:
        return False
    return (folder / CONFIG).exists()


def _find_cached_delta(repository: _Repository) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository.name, revision=repository.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    names = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]
    return folder if _select_delta_files(names, lambda file: folder / file) else None


def _download(repository: _Repository, select: SelectFiles, find_cached: Callable[[_Repository], Path | None]) -> Path:
    """Return the snapshot folder with the chosen files, or a cached one if the Hub cannot be reached."""
    repository = replace(repository, token=check_token(repository.token))
    try:
        folder = _download_snapshot(repository, select)
    except PemaError:
        raise
    except Exception as error:  # the client raises anything on an unexpected answer
        folder = find_cached(repository) if is_unreachable(error) else None
        if folder is None:
            where = f"{repository.kind} {repository.name}: no such folder, and cannot be downloaded from the Hub"
            raise MergeError(f"{where} {explain(error, 'download', repository.revision)}") from error
        return folder
    if folder is None:
        raise MergeError(_explain_none(repository))
    return folder


def _download_snapshot(repository: _Repository, select: SelectFiles) -> Path | None:
    """Download the chosen files, all of one commit even if something is pushed meanwhile; None if none are chosen."""
    from huggingface_hub import HfApi, hf_hub_download

    name, revision, token = repository.name, repository.revision, repository.token
    commit = str(with_retry(lambda: HfApi().model_info(name, revision=revision, token=token)).sha)
    if not _COMMIT.fullmatch(commit):
        raise MergeError(f"{repository.kind} {name}: the Hub says that it is at {commit!r}, expected a commit id")
    names = with_retry(lambda: list(HfApi().list_repo_files(name, revision=commit, token=token)))
    if bad := [file for file in names if not _is_relative(file)]:
        raise MergeError(f"{repository.kind} {name}: the Hub lists {bad[0]!r}, expected paths in the repository")
    fetch = cache(lambda file: Path(with_retry(lambda: hf_hub_download(name, file, revision=commit, token=token))))
    folders = [fetch(file).parents[file.count("/")] for file in select(names, fetch)]
    if not folders:
        return None
    if other := next((folder.name for folder in folders if folder.name != commit), None):
        raise MergeError(
            f"{repository.kind} {name}: the Hub gave a file of commit {other!r}, expected {commit}; try again"
        )
    if revision != commit:
        _write_ref(folders[0], revision or "main", commit)
    return folders[0]


def _is_relative(file: object) -> bool:
    """Return whether the Hub named a path below the repository's folder."""
    return isinstance(file, str) and all(map(is_plain_name, file.split("/")))


def _write_ref(snapshot: Path, revision: str, commit: str) -> None:
    """Record in the client's cache which commit a branch or tag is, as the client does, for later use offline."""
    refs = snapshot.parents[1] / "refs"
    path = refs / revision
    if not _is_relative(revision) or (path.is_file() and path.read_bytes() == commit.encode()):
        return
    with suppress(OSError):  # the cache is best-effort
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, commit.encode())


def _select_base_files(names: Collection[str], fetch: Fetch) -> list[str]:
    """Select the weights, and the small files beside them."""
    weights = _select_weights("", names, fetch)
    small = [name for name in names if "/" not in name and any(fnmatch.fnmatch(name, some) for some in _SMALL_FILES)]
    kept = [*(name for name in small if not name.endswith(".index.json")), *_select_module_files(names, fetch)]
    return [*kept, *weights] if weights else []


def _select_module_files(names: Collection[str], fetch: Fetch) -> list[str]:
    """Select the files of the modules of a Sentence Transformers model, each of which has its own folder."""
    folders = tuple(f"{path}/" for path in read_module_paths(fetch(MODULES))) if MODULES in names else ()
    return [name for name in names if name.startswith(folders)] if folders else []


def _select_delta_files(names: Collection[str], fetch: Fetch) -> list[str]:
    """Select the files of the delta at the top, or else of all deltas one level below."""
    folders = {name.split("/")[0] + "/" for name in names if name.count("/") == 1}
    below = (_select_in_folder(folder, names, fetch) for folder in sorted(folders))
    return _select_in_folder("", names, fetch) or [file for files in below for file in files]


def _select_in_folder(folder: str, names: Collection[str], fetch: Fetch) -> list[str]:
    """Select the files of the delta in `folder` ("" or "task/"); none if there is no delta."""
    if folder.startswith(".") or folder + MERGE_MANIFEST in names:
        return []
    if folder + ADAPTER_CONFIG in names:
        weights, head = (_select_first(folder, some, names) for some in (ADAPTER_WEIGHTS, HEAD_WEIGHTS))
        beside = [name for part in (HEAD_CONFIG, _INTERFACE, _CARD) if (name := folder + part) in names]
        return [folder + ADAPTER_CONFIG, *weights, *head, *beside] if weights else []
    weights = _select_weights(folder, names, fetch) if folder + CONFIG in names else []
    return [folder + CONFIG, *weights] if weights else []


def _select_weights(folder: str, names: Collection[str], fetch: Fetch) -> list[str]:
    """Select the weights files of a checkpoint in the order of `find_weight_files`, and the index of shards."""
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if folder + single in names:
            return [folder + single]
        if folder + index in names:
            shards = read_json(fetch(folder + index)).get("weight_map")
            found = {folder + str(shard) for shard in shards.values()} if isinstance(shards, dict) else set()
            return [folder + index, *(name for name in names if name in found)]
    return []


def _select_first(folder: str, wanted: tuple[str, ...], names: Collection[str]) -> list[str]:
    return [folder + name for name in wanted if folder + name in names][:1]


def _explain_none(repository: _Repository) -> str:
    where = f"{repository.kind} {repository.name}: the Hub repository holds no"
    if repository.kind == "base":
        return (
            f"{where} {SINGLE} and no {INDEX}, nor {PICKLE} or {PICKLE_INDEX}; give a repository with PyTorch weights"
        )
    return (
        f"{where} delta, neither at the top nor one level below: expected {ADAPTER_CONFIG} with {ADAPTER_WEIGHTS[0]} "
        f"(push_adapter_to_hub), or {CONFIG} with {SINGLE} (save_delta)"
    )
