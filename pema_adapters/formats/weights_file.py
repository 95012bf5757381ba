"""All tensors of one weights file, safetensors or pickle, or of a whole checkpoint."""

from pathlib import Path

from pema_adapters.formats.safetensors_header import read_header
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.torch_pickle import read_pickle


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a `.safetensors` file, or of a pickled `.bin` file (which imports torch), in file order."""
    return read_header(path).tensors if path.suffix == ".safetensors" else read_pickle(path)
