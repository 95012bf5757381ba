"""All tensors of one weights file, safetensors or pickle, or of a whole checkpoint, as bytes in memory maps."""

from pathlib import Path

from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.pickled import read_pickle
from pema_adapters.formats.safetensors_file import read_header
from pema_adapters.formats.stored import Stored, map_file


def read_tensors(path: Path) -> dict[str, Stored]:
    """All tensors of a `.safetensors` file, or of a pickled `.bin` file (which imports torch), in file order."""
    if path.suffix == ".safetensors":
        found = read_header(path).tensors.values()
        data = map_file(path)
        return {
            t.name: Stored(t.name, t.dtype, t.shape, path, data[t.start : t.start + t.nbytes], t.start) for t in found
        }
    return read_pickle(path)


def checkpoint_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """All tensors of a checkpoint, whatever its sharding."""
    tensors = checkpoint.tensors.values()
    return {t.name: Stored(t.name, t.dtype, t.shape, t.path, checkpoint.raw(t.name), t.start) for t in tensors}
