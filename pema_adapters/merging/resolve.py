"""A base on the Hub: the folder of its snapshot in the local cache, downloaded as far as it is not there."""

import fnmatch
import re
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.checkpoint import INDEX, SINGLE, Checkpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WANTED = ("*.json", "*.txt", "*.model", "*.py", "*.md", "*.jinja", "LICENSE*", "vocab*", "merges*")


def from_hub(name: str, revision: str | None) -> Path:
    """The snapshot folder of the Hub model `name`, from the cache if it is there whole, else downloaded.

    Of the weights only `model.safetensors`, or the shards of its index, are downloaded. Raises `MergeError`.
    """
    if not _HUB_ID.fullmatch(name):
        raise MergeError(f"base {name}: no such folder, and not a Hub id")
    return _cached(name, revision) or _downloaded(name, revision)


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for file in (SINGLE, INDEX):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            return folder if _is_whole(folder) else None
    return None


def _is_whole(folder: Path) -> bool:
    from pema_adapters.errors import FormatError

    try:
        Checkpoint.open(folder)
    except FormatError:
        return False
    return True


def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        names = HfApi().list_repo_files(name, revision=revision)
        folder = None
        for file in _chosen(names):
            folder = Path(hf_hub_download(name, file, revision=revision)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MergeError(f"base {name}: no such folder, and cannot be had from the Hub ({reason})") from error
    if folder is None:
        raise MergeError(f"base {name}: the Hub repository holds no {SINGLE} and no {INDEX}")
    return folder


def _chosen(names: list[str]) -> list[str]:
    """The files of a repository that a merge needs: weights once, and the small files beside them."""
    top = [name for name in names if "/" not in name]
    weights = [SINGLE] if SINGLE in top else fnmatch.filter(top, "model-*.safetensors") if INDEX in top else []
    small = [name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in _WANTED)]
    return [*small, *weights] if weights else []
