"""`pema_merge.json`: what marks a folder as the output of a merge, and says which files are the merge's own."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError
from pema_adapters.formats.delta_discovery import MERGE_MANIFEST
from pema_adapters.formats.json_object import read_json
from pema_adapters.hub.card import README
from pema_adapters.merging.report import MergeReport

VERSION = 1
CHANGED = "holds files changed after the merge, or copied without their times"
_LISTED = 5
_TIME_STEP_NS = 2_000_000_000
"""FAT keeps times in steps of 2 s, SMB and NFS servers in their own: what was set is not what is found later."""


def encode_manifest(report: MergeReport, folder: Path, names: Collection[str]) -> bytes:
    """Encode the manifest: the report, and size and time of every file `names` in `folder`."""
    stats = {name: (folder / name).stat() for name in names}
    files = {name: {"size": found.st_size, "mtime_ns": found.st_mtime_ns} for name, found in stats.items()}
    content = {"version": VERSION, **report.to_dict(), "files": files}
    return json.dumps(content, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def find_foreign_files(folder: Path, names: Collection[str]) -> str:
    """Describe what lies in the output `folder` of an earlier merge and is not that merge's own; "" for nothing.

    Args:
        folder: what the merge wrote.
        names: the files of the merge that is to replace it. A manifest of an early version does not list its own, and
            a removal that was cut off may have taken the manifest.
    """
    try:
        known = read_json(folder / MERGE_MANIFEST).get("files") if (folder / MERGE_MANIFEST).exists() else None
    except FormatError as error:
        return str(error)
    found = _files_in(folder)
    if not isinstance(known, dict):
        return _describe("holds files that no merge wrote", sorted(found - {*names, MERGE_MANIFEST}))
    foreign = sorted(found - known.keys() - {MERGE_MANIFEST})
    own = found & known.keys() - {README}  # the new card keeps what somebody wrote into the old one
    changed = sorted(name for name in own if not _is_unchanged(folder / name, known[name]))
    return _describe("holds files that no merge wrote", foreign) or _describe(CHANGED, changed)


def _files_in(folder: Path) -> set[str]:
    """Return the paths of all files and links below `folder`; links are not followed."""
    found: set[str] = set()
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found |= {Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links)}
    return found


def _is_unchanged(path: Path, known: Any) -> bool:
    found = path.stat(follow_symlinks=False)
    try:
        is_same_time = abs(found.st_mtime_ns - known["mtime_ns"]) <= _TIME_STEP_NS
        return is_same_time and bool(found.st_size == known["size"])
    except (TypeError, KeyError):
        return False


def _describe(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    return f"{what} ({shown})" if names else ""
