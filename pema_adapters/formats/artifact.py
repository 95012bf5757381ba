"""Deltas: what training leaves behind, found, read and checked.

Two kinds. An *adapter* is a folder that `save_adapter` wrote: adapter_config.json, the weights (PEMA rows among them),
perhaps a head beside them. A *full* delta is what `save_delta` or a Trainer wrote: config.json and a checkpoint whose
embedding is K rows, with `token_ids` and `fingerprint` beside it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError
from pema_adapters.formats.checkpoint import CONFIG, Checkpoint, read_json
from pema_adapters.formats.find import (
    ADAPTER_CONFIG,
    FULL_WEIGHTS,
    find_delta,
    first_file,
    has_method,
    has_trained_rows,
    is_adapter,
    is_method,
)
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.formats.names import canonical
from pema_adapters.formats.safetensors_file import FLOATS, NUMPY_DTYPES
from pema_adapters.formats.stored import Stored
from pema_adapters.formats.tensors import read_tensors

HEAD_CONFIG = "head_config.json"
ADAPTER_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")

_ROWS = re.compile(r"(?:(?P<prefix>.+)\.)?pema\.adapters\.(?P<name>[^.]+)\.(?P<part>token_ids|weight|fingerprint)")
_FULL_ROWS = re.compile(r"(?P<embedding>.+)\.token_ids")


@dataclass(frozen=True)
class Head:
    """A prediction head: `config` as in head_config.json, `tensors` by name.

    settings: what config.json must say for it (None: the key must be absent), and prefix: of the backbone in its
    class; None for both where nobody but head_config.json says.
    """

    config: dict[str, Any]
    tensors: dict[str, Stored]
    settings: dict[str, Any] | None = None
    prefix: str | None = None

    @property
    def is_static(self) -> bool:
        """Of an ordinary Transformers class; the flexible heads of AutoAdapterModel are not."""
        return self.config.get("config") is None


@dataclass(frozen=True)
class Rest:
    """The adapter without its PEMA part: `config` as in adapter_config.json, None where PEMA was all."""

    config: dict[str, Any] | None
    tensors: dict[str, Stored]


@dataclass(frozen=True)
class Delta:
    """A validated delta.

    kind: "adapter" or "full". name: of the adapter, "" for a full delta.
    prefix: of the base model, "bert"; "" where there is none.
    own_base: the trained model was a base model itself, so its tensor names carry no prefix.
    embedding: canonical name of E; "" where the artifact does not say (it has no fingerprint).
    token_ids: int64 [K], strictly increasing. weight: [K, d]; None for an adapter without PEMA, whose K is 0.
    tensors: full: everything else that was trained. head, rest: adapter: beside the rows.
    config: full: the trained model's config.json; adapter: adapter_config.json.
    """

    folder: Path
    kind: str
    name: str
    prefix: str
    own_base: bool
    embedding: str
    token_ids: np.ndarray
    weight: Stored | None
    fingerprint: Fingerprint | None
    tensors: dict[str, Stored] = field(default_factory=dict)
    head: Head | None = None
    rest: Rest = field(default_factory=lambda: Rest(None, {}))
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def untied(self) -> str:
        """The name of the output matrix that is not tied to E any more, though the base's is; "" for none."""
        return self.fingerprint.untied if self.fingerprint is not None else ""

    @property
    def static_head(self) -> Head | None:
        """The adapter's head, where it is one of an ordinary Transformers class."""
        return self.head if self.head is not None and self.head.is_static else None

    @property
    def ordinary(self) -> dict[str, Stored]:
        """The tensors that belong into an ordinary checkpoint, beside the rows: backbone weights and static head."""
        return self.static_head.tensors if self.static_head is not None else self.tensors


def read_delta(folder: str | Path, adapter: str | None = None) -> Delta:
    """Read the delta in `folder`, or the only one a level below it; `adapter` names one of several.

    Raises `FormatError` where there is none, where there are several, or where it is damaged.
    """
    found = find_delta(Path(folder), adapter)
    return _read_adapter(found) if is_adapter(found) else _read_full(found)


def _read_adapter(folder: Path) -> Delta:
    config = read_json(folder / ADAPTER_CONFIG)
    path = first_file(folder, ADAPTER_WEIGHTS)
    if path is None:
        raise FormatError(f"{folder}: {ADAPTER_CONFIG} without weights; expected {' or '.join(ADAPTER_WEIGHTS)}")
    tensors = read_tensors(path)
    parts = {name: found for name in tensors if (found := _ROWS.fullmatch(name))}
    owners = {name.removesuffix("." + found["part"]) for name, found in parts.items()}
    if len(owners) > 1:
        several = ", ".join(map(repr, sorted(owners)))
        raise FormatError(f"{path}: expected the PEMA rows of one adapter, found those of {several}; nothing to merge")
    if not owners:
        return _without_rows(folder, path, config, tensors)
    first = next(iter(parts.values()))
    prefix = first["prefix"] or ""
    rows = {found["part"]: tensors.pop(name) for name, found in parts.items()}
    token_ids, weight, fingerprint = _rows(path, rows)
    if fingerprint and prefix not in ("", fingerprint.prefix):
        raise FormatError(f"{path}: rows inside {prefix!r}, but their fingerprint says {fingerprint.prefix!r}; damaged")
    return Delta(
        folder=folder,
        kind="adapter",
        name=first["name"],
        prefix=fingerprint.prefix if fingerprint else prefix,
        own_base=not prefix,
        embedding=fingerprint.embedding if fingerprint else "",
        token_ids=token_ids,
        weight=weight,
        fingerprint=fingerprint,
        head=_read_head(folder, prefix),
        rest=Rest(_rest_config(folder, config, bool(tensors)), tensors),
        config=config,
    )


def _without_rows(folder: Path, path: Path, config: dict[str, Any], tensors: dict[str, Stored]) -> Delta:
    """An adapter without PEMA: other methods, and perhaps a head."""
    if has_trained_rows(config.get("config")):
        raise FormatError(f"{path}: expected the PEMA rows that {ADAPTER_CONFIG} names, found none; save it again")
    name = config.get("name")
    if not isinstance(name, str):
        raise FormatError(f"{folder / ADAPTER_CONFIG}: expected the name of the adapter, found {str(name)[:40]!r}")
    return Delta(
        folder=folder,
        kind="adapter",
        name=name,
        prefix="",
        own_base=False,
        embedding="",
        token_ids=np.empty(0, np.int64),
        weight=None,
        fingerprint=None,
        head=_read_head(folder, ""),
        rest=Rest(_rest_config(folder, config, bool(tensors)), tensors),
        config=config,
    )


def _read_head(folder: Path, prefix: str) -> Head | None:
    """The head beside an adapter. Whatever of the base model was saved along with it (T5) is not part of it."""
    path = first_file(folder, HEAD_WEIGHTS)
    if path is None:
        return None
    if not (folder / HEAD_CONFIG).is_file():
        raise FormatError(f"{path}: a head without {HEAD_CONFIG} that says which")
    found = read_tensors(path)
    tensors = {name: found[name] for name in found if not _is_of_base(name, prefix)}
    return Head(read_json(folder / HEAD_CONFIG), tensors) if tensors else None


def _is_of_base(name: str, prefix: str) -> bool:
    return name.startswith(prefix + ".") if prefix else _ROWS.fullmatch(name) is not None


def _rest_config(folder: Path, config: dict[str, Any], has_tensors: bool) -> dict[str, Any] | None:
    """adapter_config.json without PEMA; a union with one member left is that member."""
    method = config.get("config")
    members = method.get("configs") if isinstance(method, dict) else None
    if isinstance(method, dict) and isinstance(members, list):
        left = [member for member in members if not is_method(member)]
        method = left[0] if len(left) == 1 else {**method, "configs": left} if left else None
    elif has_method(method):
        method = None
    if (method is None) == has_tensors:
        expected, found = ("no other", "some") if has_tensors else ("more", "none")
        raise FormatError(
            f"{folder}: {ADAPTER_CONFIG} names {expected} method beside PEMA, but the weights hold {found} of it; "
            "save the adapter again"
        )
    return None if method is None else {**config, "config": method}


def _read_full(folder: Path) -> Delta:
    path = first_file(folder, FULL_WEIGHTS)
    if path is None or path.suffix == ".bin":
        path = folder / FULL_WEIGHTS[-1]
        tensors = read_tensors(path)
    else:
        tensors = dict(Checkpoint.open(folder).tensors)
    embeddings = [found["embedding"] for name in tensors if (found := _FULL_ROWS.fullmatch(name))]
    if not embeddings:
        raise FormatError(
            f"{path}: an ordinary checkpoint, not a delta: no tensor '<embedding>.token_ids' that says which rows "
            "were trained; expected what save_adapter, save_delta or a Trainer with a shrunk model wrote"
        )
    if len(embeddings) > 1:
        raise FormatError(f"{path}: {len(embeddings)} partial embeddings ({', '.join(embeddings)}), expected one")
    stored = f"{embeddings[0]}.weight"
    parts = ("token_ids", "weight", "fingerprint")
    rows = {part: tensors.pop(name) for part in parts if (name := f"{embeddings[0]}.{part}") in tensors}
    token_ids, weight, fingerprint = _rows(path, rows)
    prefix = fingerprint.prefix if fingerprint else ""
    if fingerprint and stored not in (fingerprint.embedding, f"{prefix}.{fingerprint.embedding}"):
        raise FormatError(f"{path}: rows of {stored!r}, but their fingerprint is of {fingerprint.embedding!r}; damaged")
    return Delta(
        folder=folder,
        kind="full",
        name="",
        prefix=prefix,
        own_base=not stored.startswith(prefix + "."),
        embedding=fingerprint.embedding if fingerprint else canonical(stored, prefix),
        token_ids=token_ids,
        weight=weight,
        fingerprint=fingerprint,
        tensors=tensors,
        config=read_json(folder / CONFIG),
    )


def _rows(path: Path, parts: dict[str, Stored]) -> tuple[np.ndarray, Stored, Fingerprint | None]:
    """token_ids int64 [K], weight [K, d] and the fingerprint, all checked against each other."""
    for part in ("token_ids", "weight"):
        if part not in parts:
            raise FormatError(f"{path}: PEMA rows without {part!r}; the file is damaged")
    ids, weight = parts["token_ids"], parts["weight"]
    if len(weight.shape) != 2 or weight.dtype not in FLOATS:
        raise FormatError(
            f"{path}: tensor {weight.name!r} is {weight.dtype} {list(weight.shape)}; expected rows [K, d] of floats"
        )
    fingerprint = _fingerprint(path, parts["fingerprint"]) if "fingerprint" in parts else None
    token_ids = _token_ids(path, ids, fingerprint)
    if weight.shape[0] != len(token_ids):
        raise FormatError(
            f"{path}: tensor {weight.name!r} has {weight.shape[0]} rows for {len(token_ids)} token_ids; "
            "expected as many; the file is damaged"
        )
    return token_ids, weight, fingerprint


def _token_ids(path: Path, stored: Stored, fingerprint: Fingerprint | None) -> np.ndarray:
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


def _fingerprint(path: Path, stored: Stored) -> Fingerprint:
    try:
        return Fingerprint.from_array(np.frombuffer(stored.read(), np.uint8))
    except FormatError as error:
        raise FormatError(f"{path}: tensor {stored.name!r}: {error}") from None
