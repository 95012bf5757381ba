"""Read the trained rows of a delta: their ids, their values, and the fingerprint of their base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pema_adapters.errors import FormatError
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.formats.safetensors_header import FLOATS, NUMPY_DTYPES
from pema_adapters.formats.stored_tensor import StoredTensor


@dataclass(frozen=True)
class TrainedRows:
    """The trained rows of a delta.

    Attributes:
        token_ids: Their ids, int64 [K], strictly increasing.
        weight: The rows [K, d].
        fingerprint: What the delta records of its base, None if nothing.
    """

    token_ids: np.ndarray
    weight: StoredTensor
    fingerprint: Fingerprint | None


def read_rows(path: Path, parts: Mapping[str, StoredTensor]) -> TrainedRows:
    """Read the rows of a delta and check their parts against each other.

    Args:
        path: The file, for messages.
        parts: The tensors "token_ids", "weight" and, except in old files, "fingerprint".

    Raises:
        FormatError: A part is missing, damaged, or does not fit the others.
    """
    for part in ("token_ids", "weight"):
        if part not in parts:
            raise FormatError(f"{path}: PEMA rows without {part!r}; the file is damaged")
    ids, weight = parts["token_ids"], parts["weight"]
    if len(weight.shape) != 2 or weight.dtype not in FLOATS:
        raise FormatError(
            f"{path}: tensor {weight.name!r} is {weight.dtype} {list(weight.shape)}; expected rows [K, d] of floats"
        )
    fingerprint = _read_fingerprint(path, parts["fingerprint"]) if "fingerprint" in parts else None
    token_ids = _read_token_ids(path, ids, fingerprint)
    if weight.shape[0] != len(token_ids):
        raise FormatError(
            f"{path}: tensor {weight.name!r} has {weight.shape[0]} rows for {len(token_ids)} token_ids; "
            "expected as many; the file is damaged"
        )
    return TrainedRows(token_ids, weight, fingerprint)


def _read_token_ids(path: Path, stored: StoredTensor, fingerprint: Fingerprint | None) -> np.ndarray:
    where = f"{path}: tensor {stored.name!r}"
    if stored.dtype not in ("I32", "I64") or len(stored.shape) != 1:
        raise FormatError(f"{where} is {stored.dtype} {list(stored.shape)}; expected I32 [K]")
    ids = np.frombuffer(stored.read(), NUMPY_DTYPES[stored.dtype]).astype(np.int64)
    bad = np.flatnonzero(np.diff(ids) <= 0)
    if len(bad):
        at = int(bad[0])
        raise FormatError(f"{where} must be strictly increasing, found {ids[at]} before {ids[at + 1]} at {at}")
    if len(ids) and ids[0] < 0:
        raise FormatError(f"{where} begins with {ids[0]}; expected ids from 0")
    if fingerprint and len(ids) and ids[-1] >= fingerprint.vocab_size:
        raise FormatError(f"{where} goes up to {ids[-1]}; expected ids below V = {fingerprint.vocab_size}")
    added = fingerprint.vocab_size - fingerprint.base_vocab_size if fingerprint else 0
    if added > len(ids):
        raise FormatError(f"{where} has {len(ids)} ids; expected all {added} new tokens among them")
    return ids


def _read_fingerprint(path: Path, stored: StoredTensor) -> Fingerprint:
    try:
        return Fingerprint.from_array(np.frombuffer(stored.read(), np.uint8))
    except FormatError as error:
        raise FormatError(f"{path}: tensor {stored.name!r}: {error}") from None
