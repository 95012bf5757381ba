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
from pema_adapters.formats.adapter_config import ADAPTER_CONFIG, PEMA, AdapterConfig
from pema_adapters.formats.checkpoint import CONFIG, Checkpoint
from pema_adapters.formats.delta_discovery import FULL_WEIGHTS, find_delta, find_first_file, is_adapter
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.formats.json_object import read_json
from pema_adapters.formats.safetensors_header import FLOATS, NUMPY_DTYPES
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import canonicalize
from pema_adapters.formats.trainer_checkpoints import pick_checkpoint
from pema_adapters.formats.weights import read_tensors

HEAD_CONFIG = "head_config.json"
ADAPTER_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")

_ROWS_NAME = re.compile(r"(?:(?P<prefix>.+)\.)?pema\.adapters\.(?P<name>[^.]+)\.(?P<part>token_ids|weight|fingerprint)")
_QUANTIZED = ("U8", "I8")
_FULL_ROWS_NAME = re.compile(r"(?P<embedding>.+)\.token_ids")


@dataclass(frozen=True)
class Head:
    """A prediction head: `config` as in head_config.json, which lies at `path`, `tensors` by name.

    Without any tensors it is one whose output matrix, all that it has, is tied to the embedding.
    settings: what config.json must say for it (None: the key must be absent), and prefix: of the backbone in its
    class; None for both where nobody but head_config.json says. output: the output matrix of a language model in its
    class, "" where nobody says.
    """

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    config_changes: dict[str, Any] | None = None
    prefix: str | None = None
    path: Path = Path(HEAD_CONFIG)
    output_matrix: str = ""

    @property
    def is_static(self) -> bool:
        """Of an ordinary Transformers class; the flexible heads of AutoAdapterModel are not."""
        return self.config.get("config") is None


@dataclass(frozen=True)
class RemainingAdapter:
    """The adapter without its PEMA part: its `config`, None where PEMA was all."""

    config: AdapterConfig | None
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Delta:
    """A validated delta.

    kind: "adapter" or "full". name: of the adapter, "" for a full delta.
    prefix: of the base model, "bert"; "" where there is none.
    own_base: the trained model was a base model itself, so its tensor names carry no prefix.
    embedding: canonical name of E; "" where the artifact does not say (it has no fingerprint).
    token_ids: int64 [K], strictly increasing. weight: [K, d]; None for an adapter without PEMA, whose K is 0.
    untied: name of the output matrix that is not tied to E any more, though the base's is; "" for none.
    is_output_in_head: that matrix belongs into the flexible head, rather than into the checkpoint.
    methods: their names, "pema" and the others.
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
    weight: StoredTensor | None
    fingerprint: Fingerprint | None
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    head: Head | None = None
    remaining: RemainingAdapter = field(default_factory=lambda: RemainingAdapter(None, {}))
    config: dict[str, Any] = field(default_factory=dict)
    untied: str = ""
    is_output_in_head: bool = False
    methods: tuple[str, ...] = (PEMA,)

    @property
    def recorded_base(self) -> str:
        """The Hub id or folder that the trained model was loaded from, "" where the delta does not say."""
        in_fingerprint = self.fingerprint.base if self.fingerprint is not None else ""
        names = (in_fingerprint, self.config.get("model_name"), self.config.get("_name_or_path"))
        return next((name for name in names if isinstance(name, str) and name), "")

    @property
    def static_head(self) -> Head | None:
        """The adapter's head, where it is one of an ordinary Transformers class."""
        return self.head if self.head is not None and self.head.is_static else None

    @property
    def checkpoint_tensors(self) -> dict[str, StoredTensor]:
        """The tensors that belong into an ordinary checkpoint, beside the rows: backbone weights and static head."""
        return self.static_head.tensors if self.static_head is not None else self.tensors


def read_delta(folder: str | Path, adapter: str | None = None, checkpoint: str | int | None = None) -> Delta:
    """Read the delta in `folder`, or the only one a level below it; `adapter` names one of several.

    checkpoint: of a Trainer's output folder "latest", "best", or a step; see `pick_checkpoint`.

    Raises `FormatError` where there is none, where there are several, or where it is damaged.
    """
    folder = Path(folder)
    found = find_delta(folder if checkpoint is None else pick_checkpoint(folder, checkpoint), adapter)
    return _read_adapter(found) if is_adapter(found) else _read_full(found)


def _read_adapter(folder: Path) -> Delta:
    config = AdapterConfig.read(folder)
    path = find_first_file(folder, ADAPTER_WEIGHTS)
    if path is None:
        raise FormatError(f"{folder}: {ADAPTER_CONFIG} without weights; expected {' or '.join(ADAPTER_WEIGHTS)}")
    tensors = read_tensors(path)
    parts = {name: found for name in tensors if (found := _ROWS_NAME.fullmatch(name))}
    prefix = _find_prefix(path, config, list(parts.values()))
    rows = {found["part"]: tensors.pop(name) for name, found in parts.items()}
    token_ids, weight, fingerprint = _read_rows(path, rows) if rows else (np.empty(0, np.int64), None, None)
    if fingerprint and prefix not in ("", fingerprint.prefix):
        raise FormatError(f"{path}: rows inside {prefix!r}, but their fingerprint says {fingerprint.prefix!r}; damaged")
    return Delta(
        folder=folder,
        kind="adapter",
        name=config.name,
        prefix=fingerprint.prefix if fingerprint else prefix,
        own_base=bool(rows) and not prefix,
        embedding=fingerprint.embedding if fingerprint else "",
        token_ids=token_ids,
        weight=weight,
        fingerprint=fingerprint,
        head=_read_head(folder, prefix),
        remaining=_read_remaining(folder, config, tensors),
        config=config.content,
        untied=fingerprint.untied if fingerprint else "",
        methods=tuple(method.name for method in config.methods),
    )


def _find_prefix(path: Path, config: AdapterConfig, found: list[re.Match[str]]) -> str:
    """The prefix of the base model that the PEMA rows are in. They have to be those of this adapter alone."""
    owners = sorted({(part["prefix"] or "", part["name"]) for part in found})
    if len(owners) > 1:
        several = ", ".join(sorted(repr(f"{prefix}.pema.adapters.{name}".lstrip(".")) for prefix, name in owners))
        raise FormatError(f"{path}: expected the PEMA rows of one adapter, found those of {several}; nothing to merge")
    if not owners and config.trains_rows:
        raise FormatError(f"{path}: expected the PEMA rows that {ADAPTER_CONFIG} names, found none; save it again")
    prefix, name = owners[0] if owners else ("", config.name)
    if name != config.name:
        raise FormatError(
            f"{path}: holds the PEMA rows of adapter {name!r}, but {ADAPTER_CONFIG} is that of {config.name!r}; "
            "save the adapter again"
        )
    return prefix


def _read_head(folder: Path, prefix: str) -> Head | None:
    """The head beside an adapter. Whatever of the base model was saved along with it (T5) is not part of it."""
    path, config = find_first_file(folder, HEAD_WEIGHTS), folder / HEAD_CONFIG
    if path is None and config.is_file():
        raise FormatError(f"{config}: a head without weights; expected {' or '.join(HEAD_WEIGHTS)} beside it")
    if path is None:
        return None
    if not config.is_file():
        raise FormatError(f"{path}: a head without {HEAD_CONFIG} that says which")
    found = {name: tensor for name, tensor in read_tensors(path).items() if not _belongs_to_base(name, prefix)}
    _check_not_quantized(found)
    return Head(read_json(config), found, path=config)


def _check_not_quantized(head: dict[str, StoredTensor]) -> None:
    """bitsandbytes stores a layer of 4 bits as U8, one of 8 bits as I8, and what it takes to read it beside it."""
    for tensor in head.values():
        if tensor.dtype in _QUANTIZED:
            layer = tensor.name.rpartition(".")[0]
            raise FormatError(
                f"{tensor.path}: tensor {tensor.name!r} is {tensor.dtype}: the head was quantized along with the base, "
                f'expected floats; train with BitsAndBytesConfig(..., llm_int8_skip_modules=["{layer}"])'
            )


def _belongs_to_base(name: str, prefix: str) -> bool:
    return name.startswith(prefix + ".") if prefix else _ROWS_NAME.fullmatch(name) is not None


def _read_remaining(folder: Path, config: AdapterConfig, tensors: dict[str, StoredTensor]) -> RemainingAdapter:
    left = config.without(lambda method: method.is_pema)
    if (left is None) == bool(tensors):
        expected, found = ("no other", "some") if tensors else ("more", "none")
        raise FormatError(
            f"{folder}: {ADAPTER_CONFIG} names {expected} method beside PEMA, but the weights hold {found} of it; "
            "save the adapter again"
        )
    return RemainingAdapter(left, tensors)


def _read_full(folder: Path) -> Delta:
    path = find_first_file(folder, FULL_WEIGHTS)
    if path is None or path.suffix == ".bin":
        path = folder / FULL_WEIGHTS[-1]
        tensors = read_tensors(path)
    else:
        tensors = dict(Checkpoint.open(folder).tensors)
    embeddings = [found["embedding"] for name in tensors if (found := _FULL_ROWS_NAME.fullmatch(name))]
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
    token_ids, weight, fingerprint = _read_rows(path, rows)
    prefix = fingerprint.prefix if fingerprint else ""
    if fingerprint and stored not in (fingerprint.embedding, f"{prefix}.{fingerprint.embedding}"):
        raise FormatError(f"{path}: rows of {stored!r}, but their fingerprint is of {fingerprint.embedding!r}; damaged")
    return Delta(
        folder=folder,
        kind="full",
        name="",
        prefix=prefix,
        own_base=not stored.startswith(prefix + "."),
        embedding=fingerprint.embedding if fingerprint else canonicalize(stored, prefix),
        token_ids=token_ids,
        weight=weight,
        fingerprint=fingerprint,
        tensors=tensors,
        config=read_json(folder / CONFIG),
        untied=fingerprint.untied if fingerprint else "",
    )


def _read_rows(path: Path, parts: dict[str, StoredTensor]) -> tuple[np.ndarray, StoredTensor, Fingerprint | None]:
    """token_ids int64 [K], weight [K, d] and the fingerprint, all checked against each other."""
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
    return token_ids, weight, fingerprint


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
