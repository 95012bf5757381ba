"""Tensors stored under several names: which name to keep, and which ones Transformers ties again on loading."""

from collections.abc import Iterable

from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import EMBEDDINGS, OUTPUT_BIASES, OUTPUT_MATRICES


def find_tied_names(tensors: Iterable[StoredTensor], ties_outputs: bool) -> dict[str, str]:
    """Return `{name to drop: name to keep}` of tensors of a pickled file that are the same bytes.

    Safetensors store a tensor once, pickles under every name that the model has for it. A name is dropped only if
    Transformers ties it again; other names stay, each with a copy of the bytes.

    Args:
        tensors: All tensors of the file.
        ties_outputs: Whether Transformers ties output matrices (`tie_word_embeddings`).
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
    """Return a sort key: input embeddings first, output matrices last, as Transformers ties the output to the input."""
    return not name.endswith(EMBEDDINGS), name.endswith(OUTPUT_MATRICES), len(name), name


def _is_tied_again(name: str, kept: str, ties_outputs: bool) -> bool:
    """Return whether Transformers ties `name` to `kept`; it always does so with biases and input embeddings."""
    if name.endswith(OUTPUT_BIASES):
        return True
    if kept.endswith(EMBEDDINGS) and name.endswith(EMBEDDINGS):
        return True
    return ties_outputs and (kept.endswith(EMBEDDINGS) or name.endswith(OUTPUT_MATRICES))
