"""New tensors of a base merged in place: a file of their own, so that the base's keep their place.

A base of one file becomes one of two shards, of which the first is that file under another name. Where all names get
a prefix, the header gets longer: the tensors right behind it make room, and move to the new file.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.merging.planning.output_tensor import Entry, encoded

ADDED = "model-added.safetensors"
"""The shard of tensors that a base of several shards lacked."""
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
"""What a base's only file is called then, and the one of tensors that it lacked."""
MOST_MOVED = 64 << 20
_INSTEAD = "write a new checkpoint with --output"


@dataclass
class Files:
    """The weight files of an output, by their path in the base, or by the one that they would have there.

    entries: their tensors. names: of those that are not called as they would be. starts: where the tensors begin in
    those that get a longer header.
    """

    entries: dict[Path, list[Entry]]
    names: dict[Path, str] = field(default_factory=dict)
    starts: dict[Path, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def behind(base: Checkpoint, entries: dict[Path, list[Entry]], new: list[Entry]) -> Files:
    """New tensors at the end of the last file."""
    last = base.files[-1]
    return Files({**entries, last: [*entries[last], *new]})


def apart(base: Checkpoint, entries: dict[Path, list[Entry]], new: list[Entry], prefix: str) -> Files:
    """New tensors in a file of their own. `prefix`: what all names of the base get, "" for nothing.

    Raises `MergeError` where another file has that name, or a longer header finds no room.
    """
    added = base.folder / (SHARDS[1] if base.index is None else ADDED)
    made = Files(dict(entries))
    if base.index is None:
        made.names[base.files[0]] = SHARDS[0]
        made.notes.append(f"{base.files[0].name} is called {SHARDS[0]} now, its new tensors are in {SHARDS[1]}")
    _check_free(base, {added, *(base.folder / name for name in made.names.values())})
    moved: list[Entry] = []
    for path, found in entries.items() if prefix else ():
        count, made.starts[path] = _room(base, path, found, prefix)
        made.entries[path] = found[count:]
        moved += found[:count]
    if moved:
        made.notes.append(f"{len(moved)} of the base's tensors moved to {added.name}, to make room for longer names")
    made.entries[added] = [*made.entries.get(added, []), *moved, *new]
    return made


def _check_free(base: Checkpoint, paths: set[Path]) -> None:
    for path in sorted(paths - set(base.files)):
        if path.exists() or path.is_symlink():
            raise MergeError(f"{path}: is there, but no weights file of the base, and its name is needed; {_INSTEAD}")


def _room(base: Checkpoint, path: Path, entries: list[Entry], prefix: str) -> tuple[int, int]:
    """How many tensors have to move for the header to fit before the others, and where these begin."""
    starts = [tensor.start or 0 for tensor in base.by_file[path]]
    count = bisect_left(range(len(entries)), True, key=lambda k: len(encoded(base, path, entries[k:])) <= starts[k])
    if count == len(entries) or starts[count] > MOST_MOVED:
        longer = len(encoded(base, path, entries)) - starts[0] if entries else 0
        raise MergeError(
            f"{path}: cannot be merged in place: beside a head its names need the prefix {prefix!r}, which makes its "
            f"header {longer} bytes longer, and the tensors behind it are too large to make room; {_INSTEAD}"
        )
    return count, starts[count]
