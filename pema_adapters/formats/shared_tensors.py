"""One tensor under several names: which name is kept, and which ones Transformers ties again when it loads."""

from collections.abc import Iterable

from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import EMBEDDINGS, OUTPUT_BIASES, OUTPUT_MATRICES


def find_tied_names(tensors: Iterable[StoredTensor], ties_outputs: bool) -> dict[str, str]:
    """`{name to drop: name to keep}` of the tensors of one pickled file, which are the same bytes of it.

    Safetensors store a tensor once, pickles under every name that the model had for it. A name goes only where
    Transformers ties it again; `ties_outputs`: whether it does so with output matrices (`tie_word_embeddings`).
    Other names stay, and their bytes are stored once for each.
    """
    regions: dict[object, list[str]] = {}
    for tensor in tensors:
        if tensor.nbytes:
            place = tensor.start if tensor.buffer is None else tensor.buffer.ctypes.data
            regions.setdefault((place, tensor.buffer is None, tensor.dtype, tensor.shape), []).append(tensor.name)
    dropped = {}
    for names in regions.values():
        kept = min(names, key=_preference)
        dropped.update({n: kept for n in names if n != kept and _is_tied_again(n, kept, ties_outputs)})
    return dropped


def _preference(name: str) -> tuple[bool, bool, int, str]:
    """Input embeddings first, output matrices last: Transformers ties the output to the input."""
    return not name.endswith(EMBEDDINGS), name.endswith(OUTPUT_MATRICES), len(name), name


def _is_tied_again(name: str, kept: str, ties_outputs: bool) -> bool:
    """Copies of the input embedding and biases always are."""
    if name.endswith(OUTPUT_BIASES):
        return True
    if kept.endswith(EMBEDDINGS) and name.endswith(EMBEDDINGS):
        return True
    return ties_outputs and (kept.endswith(EMBEDDINGS) or name.endswith(OUTPUT_MATRICES))
