"""V of the output, after checking that the delta's rows fit the base's matrix."""

import json

import numpy as np

from pema_adapters.errors import BaseMismatchError, FormatError, MergeError
from pema_adapters.formats.checkpoint import CONFIG, Checkpoint
from pema_adapters.formats.delta import Delta
from pema_adapters.formats.safetensors_header import FLOATS
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import EMBEDDINGS


def plan_vocab_size(base: Checkpoint, delta: Delta, embedding: str) -> int:
    """Return V of the output: the base's, or more if tokens were added to the delta's model.

    `embedding` is the name of E in the base, "" for a delta without rows. Raises `BaseMismatchError`, `MergeError`, and
    `FormatError` for a base whose config.json tells another V than its matrix has.
    """
    found = _find_vocab_size(base, delta, embedding)
    _check_config(base, base.tensors.get(embedding))
    return found


def _find_vocab_size(base: Checkpoint, delta: Delta, embedding: str) -> int:
    weight = delta.weight
    if weight is None:
        return _rows_of_base(base)
    matrix = base.tensors[embedding]
    where = f"{matrix.path}: tensor {matrix.name!r} {matrix.dtype} {list(matrix.shape)}"
    if len(matrix.shape) != 2 or matrix.dtype not in FLOATS or matrix.shape[1] != weight.shape[1]:
        raise BaseMismatchError(
            f"{where} cannot take rows of {weight.shape[1]} numbers; give the base that the delta was trained on"
        )
    rows, fingerprint = matrix.shape[0], delta.fingerprint
    if fingerprint is None or fingerprint.base_vocab_size == fingerprint.vocab_size:
        _check_last(where, delta.token_ids, rows)
        return rows
    if fingerprint.base_vocab_size != rows or fingerprint.vocab_size < rows:
        raise BaseMismatchError(
            f"{where}: the delta's model went from {fingerprint.base_vocab_size} to {fingerprint.vocab_size} tokens; "
            f"expected a base of {fingerprint.base_vocab_size} rows"
        )
    added = np.arange(rows, fingerprint.vocab_size)
    if not np.array_equal(delta.token_ids[delta.token_ids >= rows], added):
        raise MergeError(f"{weight.path}: rows for the new tokens {rows} to {fingerprint.vocab_size - 1} are missing")
    return fingerprint.vocab_size


def _check_config(base: Checkpoint, matrix: StoredTensor | None) -> None:
    """Raise `FormatError` where config.json tells another V than the matrix has: nothing would load the output."""
    if "vocab_size" not in base.config:
        return
    found, path = base.config["vocab_size"], base.folder / CONFIG
    if type(found) is not int or found < 1:
        raise FormatError(f"{path}: vocab_size is {json.dumps(found)[:40]}; expected a number above 0")
    if matrix is not None and found != matrix.shape[0]:
        raise FormatError(
            f"{path}: vocab_size is {found}, but tensor {matrix.name!r} of {matrix.path.name} has {matrix.shape[0]} "
            "rows; Transformers does not load such a checkpoint: correct config.json first"
        )


def _rows_of_base(base: Checkpoint) -> int:
    found = (t.shape[0] for t in base.tensors.values() if t.name.endswith(EMBEDDINGS) and len(t.shape) == 2)
    return next(found, 0)


def _check_last(where: str, token_ids: np.ndarray, rows: int) -> None:
    if len(token_ids) and token_ids[-1] >= rows:
        raise BaseMismatchError(f"{where}: the delta has a row for token {token_ids[-1]}; expected ids below {rows}")
