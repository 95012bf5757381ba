"""New tensors of a base merged in place: a file of their own, so that the base's keep their place.

A base of one file becomes one of two shards, of which the first is that file under another name. Where all names get
a prefix, the header gets longer: the tensors right behind it make room, and move to the new file.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.merging.plan.plan import WRITE_ANEW
from pema_adapters.merging.planning.output_tensor import OutputTensor, encode_file_header

ADDED = "model-added.safetensors"
"""The shard of tensors that a base of several shards lacked."""
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
"""What a base's only file is called then, and the one of tensors that it lacked."""
MAX_MOVED = 64 << 20


@dataclass
class TensorsByFile:
    """The tensors of each weight file of the output.

    Attributes:
        tensors: by the path of the file in the base, or the path that it would have there.
        names: the names of files that are called otherwise in the output.
        starts: where the tensors begin, for files that get a longer header.
        notes: for the report.
    """

    tensors: dict[Path, list[OutputTensor]]
    names: dict[Path, str] = field(default_factory=dict)
    starts: dict[Path, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def append_to_last(base: Checkpoint, tensors: dict[Path, list[OutputTensor]], new: list[OutputTensor]) -> TensorsByFile:
    """Append new tensors to the last file."""
    last = base.files[-1]
    return TensorsByFile({**tensors, last: [*tensors[last], *new]})


def add_shard(
    base: Checkpoint, tensors: dict[Path, list[OutputTensor]], new: list[OutputTensor], prefix: str
) -> TensorsByFile:
    """Put new tensors into a file of their own.

    Args:
        prefix: prepended to all names of the base; "" for nothing.

    Raises:
        MergeError: another file has that name, or a longer header finds no room.
    """
    added = base.folder / (SHARDS[1] if base.index is None else ADDED)
    made = TensorsByFile(dict(tensors))
    if base.index is None:
        made.names[base.files[0]] = SHARDS[0]
        made.notes.append(f"{base.files[0].name} is called {SHARDS[0]} now, its new tensors are in {SHARDS[1]}")
    _check_free(base, {added, *(base.folder / name for name in made.names.values())})
    moved: list[OutputTensor] = []
    for path, found in tensors.items() if prefix else ():
        count, made.starts[path] = _measure_header_room(base, path, found, prefix)
        made.tensors[path] = found[count:]
        moved += found[:count]
    if moved:
        made.notes.append(f"{len(moved)} of the base's tensors moved to {added.name}, to make room for longer names")
    made.tensors[added] = [*made.tensors.get(added, []), *moved, *new]
    return made


def _check_free(base: Checkpoint, paths: set[Path]) -> None:
    for path in sorted(paths - set(base.files)):
        if path.exists() or path.is_symlink():
            raise MergeError(f"{path}: is there, but no weights file of the base, and its name is needed; {WRITE_ANEW}")


def _measure_header_room(base: Checkpoint, path: Path, tensors: list[OutputTensor], prefix: str) -> tuple[int, int]:
    """Return how many tensors have to move for the header to fit, and where the others begin."""
    starts = [tensor.start or 0 for tensor in base.by_file[path]]
    count = bisect_left(
        range(len(tensors)), True, key=lambda k: len(encode_file_header(base, path, tensors[k:])) <= starts[k]
    )
    if count == len(tensors) or starts[count] > MAX_MOVED:
        longer = len(encode_file_header(base, path, tensors)) - starts[0] if tensors else 0
        raise MergeError(
            f"{path}: cannot be merged in place: beside a head its names need the prefix {prefix!r}, which makes its "
            f"header {longer} bytes longer, and the tensors behind it are too large to make room; {WRITE_ANEW}"
        )
    return count, starts[count]
