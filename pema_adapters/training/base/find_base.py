"""Find the base of a model: the checkpoint on disk that it was loaded from, else the model as it is now."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pema_adapters.errors import FormatError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.fingerprint import Fingerprint, TensorSource, sample_positions
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import map_canonical_names
from pema_adapters.formats.weights import INDEX, PICKLE, PICKLE_INDEX, SINGLE, WeightFiles
from pema_adapters.training import upstream
from pema_adapters.training.base.base_model import BaseModel
from pema_adapters.training.base.live_model import LiveModel
from pema_adapters.training.base.mapped_rows import TORCH_DTYPES, MappedRows, iterate_blocks

logger = logging.getLogger(__name__)


def find_base(model: nn.Module, weight: Tensor, embedding: str) -> BaseModel:
    """Find the base of `model`.

    Its checkpoint is used only if all rows of the matrix, and samples of the other tensors, equal what the model holds
    now (in the model's dtype). Otherwise the matrix is spilled to a file, and the model as it is now is the base.

    Args:
        model: a Transformers model.
        weight: its embedding matrix [V, d].
        embedding: name of that matrix within the base model.
    """
    live = LiveModel(model, embedding)
    checkpoint = find_checkpoint(model)
    if checkpoint is not None:
        base = _match_checkpoint(checkpoint, live, weight)
        if base is not None:
            return base
        logger.warning(
            "the model differs from its checkpoint in %s: the model as it is now is taken as the base, "
            "so merge into a checkpoint of it (save_pretrained)", checkpoint.folder,
        )  # fmt: skip
    names = [name for name in live.shapes() if name != embedding]
    fingerprint = _compute_fingerprint(live, embedding, live.prefix, weight.shape[0], names)
    logger.info("base rows: %.0f MB spilled to a file in the temporary folder", weight.nbytes / 1e6)
    return BaseModel(MappedRows.spill(weight), fingerprint)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [V, d] of a checkpoint, whose rows are read from its file when they are needed.

    Attributes:
        checkpoint: the checkpoint.
        prefix: of the base model.
        name: of the matrix within the base model.
        rows: its rows.
    """

    checkpoint: Checkpoint
    prefix: str
    name: str
    rows: MappedRows

    @classmethod
    def find(cls, files: Sequence[str], prefix: str, name: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """Find the matrix in the `files` of a checkpoint.

        Returns:
            None if the checkpoint has no such matrix of this `shape`, or its rows cannot be read in place.
        """
        paths = tuple(map(Path, files))
        is_pickled = any(path.suffix != ".safetensors" for path in paths)
        try:
            checkpoint = Checkpoint.from_files(paths[0].parent, WeightFiles(paths, None, None, is_pickled))
        except FormatError:
            return None
        tensor = checkpoint.tensors.get(map_canonical_names(checkpoint.tensors, prefix).get(name, ""))
        if tensor is None or tensor.shape != shape or not _is_readable(tensor):
            return None
        return cls(checkpoint, prefix, name, MappedRows.of(tensor))

    def is_among(self, names: Iterable[str]) -> bool:
        """Return whether the matrix is one of `names`, with the prefix of the base model or without it."""
        return self.name in map_canonical_names(names, self.prefix)

    def make_base(self, model: Any) -> BaseModel:
        """Make the base of a model that has just loaded all other weights from this checkpoint.

        For `load_model` alone: it compares nothing, since nothing can have changed yet.
        """
        live = LiveModel(model, self.name, absent=(len(self.rows), self.rows.dim))
        return _make_base(self.checkpoint, live, map_canonical_names(self.checkpoint.tensors, live.prefix), self.rows)


def find_checkpoint(model: Any) -> Checkpoint | None:
    """Find the checkpoint that `model` was loaded from: a local folder, or a snapshot in the Hub cache."""
    folder = _find_folder(str(model.name_or_path or ""), upstream.get_commit_hash(model))
    if folder is None:
        return None
    try:
        return Checkpoint.open(folder)
    except FormatError:
        return None


def _find_folder(name: str, commit: str | None) -> Path | None:
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in (SINGLE, INDEX, PICKLE, PICKLE_INDEX):
        try:
            cached = try_to_load_from_cache(name, file, revision=commit)
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def _match_checkpoint(checkpoint: Checkpoint, live: LiveModel, weight: Tensor) -> BaseModel | None:
    """Return the base that `checkpoint` is, None if the model differs from it."""
    stored = map_canonical_names(checkpoint.tensors, live.prefix)
    if live.embedding not in stored:
        return None
    rows = _match_rows(weight, checkpoint.tensors[stored[live.embedding]])
    common = [name for name in live.shapes() if name in stored and name != live.embedding]
    if rows is None or not all(_has_same_samples(checkpoint, stored[name], live, name) for name in common):
        return None
    return _make_base(checkpoint, live, stored, rows)


def _make_base(checkpoint: Checkpoint, live: LiveModel, stored: Mapping[str, str], rows: MappedRows) -> BaseModel:
    common = [stored[name] for name in live.shapes() if name in stored and name != live.embedding]
    new = live.find_newly_initialized(stored)
    if new:
        logger.warning(
            "%s lacks %s, which from_pretrained newly initialized: an adapter trained on it can be merged only into a "
            "checkpoint that has them (model.save_pretrained writes one)", checkpoint.folder, ", ".join(new),
        )  # fmt: skip
    fingerprint = _compute_fingerprint(checkpoint, stored[live.embedding], live.prefix, len(rows), common)
    fingerprint = replace(fingerprint, base=live.name)
    return BaseModel(rows, fingerprint, _compute_fingerprint(live, live.embedding, live.prefix, len(rows), new).tensors)


def _match_rows(weight: Tensor, tensor: StoredTensor) -> MappedRows | None:
    """Return the rows of the checkpoint, if `weight` [V, d] begins with them; a resize added the others."""
    fits = len(tensor.shape) == 2 and tensor.shape[0] <= weight.shape[0] and tensor.shape[1] == weight.shape[1]
    if not fits or not _is_readable(tensor):
        return None
    count = tensor.shape[0]
    on_disk = MappedRows.of(tensor)
    for ours, theirs in zip(
        iterate_blocks(weight[:count], on_disk.rows_per_block), on_disk.iterate_blocks(), strict=True
    ):
        if not torch.equal(ours, theirs.to(ours.dtype)):
            return None
    if weight.shape[0] == count:
        return on_disk
    return on_disk.with_added_rows(weight[count:].detach().cpu().clone())


def _is_readable(tensor: StoredTensor) -> bool:
    """Return whether rows can be read in place: the dtype is known and the rows are contiguous."""
    return tensor.dtype in TORCH_DTYPES and tensor.start is not None


def _has_same_samples(checkpoint: Checkpoint, file_name: str, live: LiveModel, name: str) -> bool:
    tensor = live.get_tensor(name)
    if not tensor.is_floating_point():
        return True  # quantized in memory: the fingerprint covers the checkpoint's own bytes
    if checkpoint.tensors[file_name].shape != tuple(tensor.shape):
        return False
    positions = sample_positions(tuple(tensor.shape))
    return not len(positions) or live.has_values(name, positions, checkpoint.values(file_name, positions))


def _compute_fingerprint(
    source: TensorSource, embedding: str, prefix: str, vocab_size: int, names: list[str]
) -> Fingerprint:
    return Fingerprint.compute(
        source, embedding=embedding, prefix=prefix, vocab_size=vocab_size, token_ids=np.empty(0, np.int32), names=names
    )
