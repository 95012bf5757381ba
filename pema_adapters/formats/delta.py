"""Deltas, the results of training, read and validated.

There are two kinds. An *adapter* is a folder that `save_adapter` wrote: adapter_config.json and the weights, with PEMA
rows among them and possibly a head beside them. A *full* delta is what `save_delta` or a Trainer wrote: config.json and
a checkpoint whose embedding has K rows, with `token_ids` and `fingerprint` beside it.
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
from pema_adapters.formats.delta_rows import read_rows
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.formats.json_object import read_json
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import canonicalize
from pema_adapters.formats.trainer_checkpoints import pick_checkpoint
from pema_adapters.formats.weights import read_tensors

HEAD_CONFIG = "head_config.json"
ADAPTER_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")

_ROWS_NAME = re.compile(r"(?:(?P<prefix>.+)\.)?pema\.adapters\.(?P<name>[^.]+)\.(?P<part>token_ids|weight|fingerprint)")
ROWS_PARTS = ("token_ids", "weight", "fingerprint")
_QUANTIZED = ("U8", "I8")
_FULL_ROWS_NAME = re.compile(r"(?P<embedding>.+)\.token_ids")


@dataclass(frozen=True)
class Head:
    """A prediction head.

    Attributes:
        config: The content of head_config.json.
        tensors: Its tensors by name; none if it is only an output matrix tied to the embedding.
        config_changes: What config.json must say for this head (None: the key must be absent); None as a whole if
            only head_config.json describes the head.
        prefix: The backbone's prefix in the head's model class; None like `config_changes`.
        path: head_config.json.
        output_matrix: The name of a language model's output matrix in its class, "" if unknown.
    """

    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    config_changes: dict[str, Any] | None = None
    prefix: str | None = None
    path: Path = Path(HEAD_CONFIG)
    output_matrix: str = ""

    @property
    def is_static(self) -> bool:
        """Whether the head belongs to a Transformers class, unlike the flexible heads of AutoAdapterModel."""
        return self.config.get("config") is None


@dataclass(frozen=True)
class RemainingAdapter:
    """What remains of an adapter without PEMA: its configuration, None if nothing remains, and its tensors."""

    config: AdapterConfig | None
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class Delta:
    """A validated delta.

    Attributes:
        folder: The folder of the delta.
        kind: "adapter" or "full".
        name: The adapter's name, "" for a full delta.
        prefix: The base model's prefix, "bert" for example; "" if there is none.
        own_base: Whether the trained model was a base model itself, so that its tensor names carry no prefix.
        embedding: The canonical name of E; "" if the delta does not say (it has no fingerprint).
        token_ids: The ids of the trained rows, int64 [K], strictly increasing.
        weight: The trained rows [K, d]; None for an adapter without PEMA (K = 0).
        fingerprint: What the delta records of its base, None if nothing.
        tensors: All other trained tensors of a full delta.
        head: The adapter's head.
        remaining: The adapter without its PEMA part.
        config: The JSON of config.json (full) or adapter_config.json (adapter).
        untied: The name of the output matrix that is no longer tied to E, though the base's is; "" for none.
        is_output_in_head: Whether that matrix belongs to the flexible head, rather than to the checkpoint.
        methods: The names of the adapter's methods, "pema" among them.
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
        """The Hub id or folder that the trained model was loaded from, "" if the delta does not say."""
        in_fingerprint = self.fingerprint.base if self.fingerprint is not None else ""
        names = (in_fingerprint, self.config.get("model_name"), self.config.get("_name_or_path"))
        return next((name for name in names if isinstance(name, str) and name), "")

    @property
    def static_head(self) -> Head | None:
        """The adapter's head if it belongs to a Transformers class, else None."""
        return self.head if self.head is not None and self.head.is_static else None

    @property
    def checkpoint_tensors(self) -> dict[str, StoredTensor]:
        """The tensors to write to an ordinary checkpoint besides the rows: backbone weights, or a static head."""
        return self.static_head.tensors if self.static_head is not None else self.tensors


def read_delta(folder: str | Path, adapter: str | None = None, checkpoint: str | int | None = None) -> Delta:
    """Find and read a delta.

    Args:
        folder: The delta's folder, or one that holds it at most two levels below.
        adapter: Which delta to take if there are several; see `find_delta`.
        checkpoint: Which checkpoint of a Trainer's output folder to take: "latest", "best", or a step.

    Raises:
        FormatError: There is no delta, there are several, or it is damaged.
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
    stored = {found["part"]: tensors.pop(name) for name, found in parts.items()}
    rows = read_rows(path, stored) if stored else None
    fingerprint = rows.fingerprint if rows else None
    if fingerprint and prefix not in ("", fingerprint.prefix):
        raise FormatError(
            f"{path}: rows inside {prefix!r}, but their fingerprint says {fingerprint.prefix!r}; the file is damaged"
        )
    return Delta(
        folder=folder,
        kind="adapter",
        name=config.name,
        prefix=fingerprint.prefix if fingerprint else prefix,
        own_base=rows is not None and not prefix,
        embedding=fingerprint.embedding if fingerprint else "",
        token_ids=rows.token_ids if rows else np.empty(0, np.int64),
        weight=rows.weight if rows else None,
        fingerprint=fingerprint,
        head=_read_head(folder, prefix),
        remaining=_read_remaining(folder, config, tensors),
        config=config.content,
        untied=fingerprint.untied if fingerprint else "",
        methods=tuple(method.name for method in config.methods),
    )


def _find_prefix(path: Path, config: AdapterConfig, found: list[re.Match[str]]) -> str:
    """Return the prefix of the base model in the names of the PEMA rows, which must be those of this adapter alone."""
    owners = sorted({(part["prefix"] or "", part["name"]) for part in found})
    if len(owners) > 1:
        several = ", ".join(sorted(repr(f"{prefix}.pema.adapters.{name}".lstrip(".")) for prefix, name in owners))
        raise FormatError(
            f"{path}: expected the PEMA rows of one adapter, found those of {several}; save the adapter by itself"
        )
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
    """Read the head beside an adapter, without the tensors of the base model that T5 saves along with it."""
    path, config = find_first_file(folder, HEAD_WEIGHTS), folder / HEAD_CONFIG
    if path is None and config.is_file():
        raise FormatError(f"{config}: a head without weights; expected {' or '.join(HEAD_WEIGHTS)} beside it")
    if path is None:
        return None
    if not config.is_file():
        raise FormatError(f"{path}: a head without {HEAD_CONFIG}; save the adapter again")
    found = {name: tensor for name, tensor in read_tensors(path).items() if not _belongs_to_base(name, prefix)}
    _check_not_quantized(found)
    return Head(read_json(config), found, path=config)


def _check_not_quantized(head: dict[str, StoredTensor]) -> None:
    """Refuse a head of bitsandbytes, which stores a 4-bit layer as U8 and an 8-bit one as I8."""
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
        named, found = ("no method", "others") if tensors else ("methods", "none")
        raise FormatError(
            f"{folder}: {ADAPTER_CONFIG} names {named} besides PEMA, but the weights hold {found}; "
            "save the adapter again"
        )
    return RemainingAdapter(left, tensors)


def _read_full(folder: Path) -> Delta:
    path, tensors = _read_full_tensors(folder)
    embedding = _find_embedding(path, tensors)
    stored = f"{embedding}.weight"
    parts = {part: tensors.pop(name) for part in ROWS_PARTS if (name := f"{embedding}.{part}") in tensors}
    rows = read_rows(path, parts)
    fingerprint = rows.fingerprint
    prefix = fingerprint.prefix if fingerprint else ""
    if fingerprint and stored not in (fingerprint.embedding, f"{prefix}.{fingerprint.embedding}"):
        raise FormatError(
            f"{path}: rows of {stored!r}, but their fingerprint is of {fingerprint.embedding!r}; the file is damaged"
        )
    return Delta(
        folder=folder,
        kind="full",
        name="",
        prefix=prefix,
        own_base=not stored.startswith(prefix + "."),
        embedding=fingerprint.embedding if fingerprint else canonicalize(stored, prefix),
        token_ids=rows.token_ids,
        weight=rows.weight,
        fingerprint=fingerprint,
        tensors=tensors,
        config=read_json(folder / CONFIG),
        untied=fingerprint.untied if fingerprint else "",
    )


def _read_full_tensors(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    """Read all tensors of a full delta, and return them with the file to name in messages."""
    path = find_first_file(folder, FULL_WEIGHTS)
    if path is None or path.suffix == ".bin":
        path = folder / FULL_WEIGHTS[-1]
        return path, read_tensors(path)
    return path, dict(Checkpoint.open(folder).tensors)


def _find_embedding(path: Path, tensors: dict[str, StoredTensor]) -> str:
    """Return the name of the partial embedding, without ".weight"."""
    found = [match["embedding"] for name in tensors if (match := _FULL_ROWS_NAME.fullmatch(name))]
    if not found:
        raise FormatError(
            f"{path}: an ordinary checkpoint, not a delta: it has no tensor '<embedding>.token_ids' with the ids "
            "of the trained rows; expected the output of save_adapter, save_delta, or a Trainer with a shrunk model"
        )
    if len(found) > 1:
        raise FormatError(f"{path}: {len(found)} partial embeddings ({', '.join(found)}), expected one")
    return found[0]
