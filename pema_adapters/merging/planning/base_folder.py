"""The folder of the base: as the user names it, or else as the delta records it; here, or from the Hub."""

from dataclasses import dataclass
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.delta import Delta
from pema_adapters.formats.delta_discovery import FULL_WEIGHTS, find_first_file
from pema_adapters.hub.download import HUB_ID, download_base
from pema_adapters.io.escaping import escape_terminal


@dataclass(frozen=True)
class BaseRequest:
    """The base that the user asks for.

    name: a folder or a Hub id; None for the one that the delta records. revision, token: for the Hub.
    must_be_folder: the base will be changed, so it is a folder that the user names.
    """

    name: str | None
    revision: str | None = None
    token: str | bool | None = None
    must_be_folder: bool = False


@dataclass(frozen=True)
class FoundBase:
    """name: folder or Hub id, for reports. notes: how it was found, if not by the name that the user gave."""

    name: str
    folder: Path
    notes: tuple[str, ...] = ()


def locate_base(request: BaseRequest, delta: Delta) -> FoundBase:
    """Find the base, and download it where it is on the Hub alone.

    A folder that the user names comes first. No name, or one that ends the recorded one (`xlm-v-base` for
    `facebook/xlm-v-base`), stands for the recorded base: a folder of its full name or of its last part in the current
    folder, or else a Hub id. Whether it is the right one, the delta's fingerprint tells later.

    Raises:
        MergeError: there is no such base; the message says on which one the delta was trained.
    """
    given = request.name
    if given is not None and Path(given).is_dir():
        return FoundBase(given, Path(given))
    if given is not None and Path(given).exists():
        raise MergeError(f"base {given}: is a file, expected the folder of a checkpoint, such as {Path(given).parent}")
    if request.must_be_folder:
        raise MergeError(
            f"base {given}: no such folder; a merge in place takes a folder of your own, not a Hub id"
            if given is not None
            else "a merge in place changes the base; name its folder with --base"
        )
    recorded = delta.recorded_base
    if given is not None and not _stands_for(given, recorded):
        return FoundBase(given, _download(given, recorded, request))
    if not recorded:
        raise MergeError(f"{delta.folder}: the delta does not record its base; name the base with --base")
    return _locate_recorded(recorded, given, request)


def _stands_for(given: str, recorded: str) -> bool:
    return recorded.rstrip("/").endswith("/" + given.rstrip("/"))


def _locate_recorded(recorded: str, given: str | None, request: BaseRequest) -> FoundBase:
    folder = _folder_of(recorded)
    name = recorded if folder in (None, Path(recorded)) else str(folder)
    note = _describe(escape_terminal(recorded), escape_terminal(name), given)
    return FoundBase(name, folder or _download_recorded(recorded, request), (note,))


def _folder_of(recorded: str) -> Path | None:
    """Return the folder of that name, or of its last part in the current folder, if it holds weights."""
    for folder in (Path(recorded), Path(Path(recorded).name)):
        try:
            if folder.name and find_first_file(folder, FULL_WEIGHTS) is not None:
                return folder
        except OSError:  # too long for a name, say
            continue
    return None


def _describe(recorded: str, name: str, given: str | None) -> str:
    where = "" if name == recorded else f"; found as the folder {name}"
    if given is None:
        return f"base: {recorded}, as recorded in the delta{where}"
    return f"base {given}: stands for {recorded}, as recorded in the delta{where}"


def _download(name: str, recorded: str, request: BaseRequest) -> Path:
    try:
        return download_base(name, request.revision, request.token)
    except MergeError as error:
        if not recorded or recorded == name:
            raise
        raise MergeError(f"{error}; the delta was trained on {recorded}") from error


def _download_recorded(recorded: str, request: BaseRequest) -> Path:
    if not HUB_ID.fullmatch(recorded):
        relative = "" if Path(recorded).is_absolute() else ", relative to where the training ran"
        raise MergeError(f"the delta was trained on {recorded}, a folder that is not here{relative}; give --base")
    try:
        return download_base(recorded, request.revision, request.token)
    except MergeError as error:
        raise MergeError(f"the delta was trained on {recorded}; give --base, for {error}") from error
