"""Finding the base of a model: the checkpoint on disk that it was loaded from, or else the model itself as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pema_adapters.errors import FormatError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.fingerprint import Fingerprint, TensorSource, digest_rows, sample_positions
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import map_canonical_names
from pema_adapters.formats.weights import INDEX, PICKLE, PICKLE_INDEX, SINGLE, WeightFiles
from pema_adapters.training.base.mapped_rows import TORCH_DTYPES, BaseRows, blocks
from pema_adapters.training.upstream import private_names as _upstream

logger = logging.getLogger(__name__)


Digests = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Base:
    """What a model was before training: its rows, and the fingerprint that an artifact will carry.

    `drawn` are the base model's tensors that its checkpoint lacks, drawn at random when it was loaded (BERT's pooler,
    say).
    """

    matrix: BaseRows
    fingerprint: Fingerprint
    drawn: Digests = field(default_factory=dict)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Base rows [n, d] of `token_ids` [n], on the CPU."""
        return self.matrix.rows(token_ids)

    def fingerprint_for(self, token_ids: Tensor, *, with_drawn: bool, untied: str = "") -> Tensor:
        """The fingerprint of this base as an artifact with rows for `token_ids` [K] carries it: uint8 [n].

        An adapter does not carry what was drawn, so only a base that has it will do (`with_drawn`). A full delta does.
        untied: the output matrix that is no longer tied to this one.
        """
        tensors = {**self.fingerprint.tensors, **(self.drawn if with_drawn else {})}
        return refit(replace(self.fingerprint, tensors=tensors, untied=untied), token_ids, self.rows)

    def __deepcopy__(self, memo: object) -> Base:
        return self


def refit(fingerprint: Fingerprint, token_ids: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
    """The same base, for other `token_ids` [K], as uint8 [n]; `rows` gives base rows [n, d] for ids [n]."""
    ids = token_ids.cpu().numpy()
    old = ids[ids < fingerprint.base_vocab_size]
    digest = digest_rows(lambda some: _float32(rows(torch.from_numpy(some))), old)
    return torch.from_numpy(replace(fingerprint, rows=digest).to_array().copy())


def find_base(model: nn.Module, weight: Tensor, embedding: str) -> Base:
    """The base of `model`, whose embedding matrix `weight` [V, d] has the name `embedding` within the base model.

    The checkpoint is taken only if every row of it and samples of the other tensors are what the model holds now (in
    the dtype of the model). Otherwise the matrix goes to a spill file, and the model as it is now is the base.
    """
    live = LiveModel(model, embedding)
    checkpoint = find_checkpoint(model)
    if checkpoint is not None:
        base = _from_checkpoint(checkpoint, live, weight)
        if base is not None:
            return base
        logger.warning(
            "the model differs from its checkpoint in %s: the model as it is now is taken as the base, "
            "so merge into a checkpoint of it (save_pretrained)", checkpoint.folder,
        )  # fmt: skip
    names = [name for name in live.shapes() if name != embedding]
    fingerprint = _take(live, embedding, live.prefix, weight.shape[0], names)
    logger.info("base rows: %.0f MB spilled to a file in the temporary folder", weight.nbytes / 1e6)
    return Base(BaseRows.spill(weight), fingerprint)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [V, d] of a checkpoint, called `name` within the base model, whose rows are read where they lie."""

    checkpoint: Checkpoint
    prefix: str
    name: str
    rows: BaseRows

    @classmethod
    def find(cls, files: Sequence[str], prefix: str, name: str, shape: tuple[int, ...]) -> StoredMatrix | None:
        """The matrix in the `files` that make a checkpoint; None where it has another shape, or cannot be read so."""
        paths = tuple(map(Path, files))
        is_pickled = any(path.suffix != ".safetensors" for path in paths)
        try:
            checkpoint = Checkpoint.from_files(paths[0].parent, WeightFiles(paths, None, None, is_pickled))
        except FormatError:
            return None
        tensor = checkpoint.tensors.get(map_canonical_names(checkpoint.tensors, prefix).get(name, ""))
        if tensor is None or tensor.shape != shape or not _is_readable(tensor):
            return None
        return cls(checkpoint, prefix, name, BaseRows.of(tensor))

    def is_among(self, names: Iterable[str]) -> bool:
        """Whether the matrix is one of the `names` of tensors, with the prefix of the base model or without it."""
        return self.name in map_canonical_names(names, self.prefix)

    def base_of(self, model: Any) -> Base:
        """The base of a model that got all other weights from this checkpoint a moment ago.

        Only `load_model` may call this: nothing is compared, for nothing can have changed yet.
        """
        live = LiveModel(model, self.name, absent=(len(self.rows), self.rows.dim))
        return _stored_base(self.checkpoint, live, map_canonical_names(self.checkpoint.tensors, live.prefix), self.rows)


def find_checkpoint(model: Any) -> Checkpoint | None:
    """The checkpoint that `model` was loaded from: a local folder or a snapshot in the Hub cache."""
    folder = _checkpoint_folder(str(model.name_or_path or ""), _upstream.commit_of(model))
    if folder is None:
        return None
    try:
        return Checkpoint.open(folder)
    except FormatError:
        return None


def _checkpoint_folder(name: str, commit: str | None) -> Path | None:
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


class LiveModel:
    """The base model's tensors as they are in memory, as a `formats.fingerprint.TensorSource`.

    name: the Hub id or folder that it was loaded from, "" where that cannot be printed.
    absent: the shape of the embedding, while `load_model` leaves it out.
    """

    def __init__(self, model: Any, embedding: str, absent: tuple[int, int] = (0, 0)) -> None:
        self.prefix = str(model.base_model_prefix or "")
        self.embedding = embedding
        name = str(model.name_or_path or "")
        self.name = name if name.isprintable() else ""
        added = _upstream.adapter_tensor_names(model)
        state = _without_quantization(model.base_model)
        state.setdefault(embedding, torch.empty(absent, device="meta"))
        place = state[embedding].data_ptr() or None
        self._tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in state.items()
            if name not in added and (name == embedding or tensor.data_ptr() != place)
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names within the base model, and shapes."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows [n, d] as float32."""
        return _float32(self._tensors[name][torch.from_numpy(ids).long().to(self._tensors[name].device)])

    def values(self, name: str, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Values [n] at flat positions [n] as float32."""
        flat = self._tensors[name].reshape(-1)
        return _float32(flat[torch.from_numpy(positions).to(flat.device)])

    def agrees(self, name: str, positions: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> bool:
        """Whether float32 `values` [n] of a checkpoint, loaded in this model's dtype, are what it holds."""
        loaded = torch.from_numpy(values).to(self._tensors[name].dtype)
        return np.array_equal(self.values(name, positions), _float32(loaded), equal_nan=True)

    def tensor(self, name: str) -> Tensor:
        """The tensor in memory."""
        return self._tensors[name]

    def drawn(self, stored: Collection[str]) -> list[str]:
        """The tensors that a checkpoint of the names `stored` has not, under no name: what is tied is stored once.

        What is on the meta device yet will be tied.
        """
        places = {tensor.data_ptr() for name, tensor in self._tensors.items() if name in stored}
        missing = {name: tensor for name, tensor in self._tensors.items() if name not in stored and not tensor.is_meta}
        return [name for name, tensor in missing.items() if tensor.data_ptr() not in places or not tensor.numel()]


def _without_quantization(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, without what quantised layers save beside their weights (scales, formats)."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    known = {name for name, _ in tensors}
    return {name: tensor for name, tensor in model.state_dict().items() if name in known}


def _from_checkpoint(checkpoint: Checkpoint, live: LiveModel, weight: Tensor) -> Base | None:
    stored = map_canonical_names(checkpoint.tensors, live.prefix)
    if live.embedding not in stored:
        return None
    tensor = checkpoint.tensors[stored[live.embedding]]
    rows = _same_rows(weight, tensor)
    common = {name: stored[name] for name in live.shapes() if name in stored and name != live.embedding}
    if rows is None or not all(_same_samples(checkpoint, file_name, live, name) for name, file_name in common.items()):
        return None
    return _stored_base(checkpoint, live, stored, rows)


def _stored_base(checkpoint: Checkpoint, live: LiveModel, stored: Mapping[str, str], rows: BaseRows) -> Base:
    common = [stored[name] for name in live.shapes() if name in stored and name != live.embedding]
    drawn = live.drawn(stored)
    if drawn:
        logger.warning(
            "%s lacks %s, which from_pretrained newly initialized: an adapter trained on it can be merged only into a "
            "checkpoint that has them (model.save_pretrained writes one)", checkpoint.folder, ", ".join(drawn),
        )  # fmt: skip
    fingerprint = _take(checkpoint, stored[live.embedding], live.prefix, len(rows), common)
    fingerprint = replace(fingerprint, base=live.name)
    return Base(rows, fingerprint, _take(live, live.embedding, live.prefix, len(rows), drawn).tensors)


def _same_rows(weight: Tensor, tensor: Any) -> BaseRows | None:
    """The rows of the checkpoint, if they are the first of `weight` [V, d]; the rest were added by a resize."""
    fits = len(tensor.shape) == 2 and tensor.shape[0] <= weight.shape[0] and tensor.shape[1] == weight.shape[1]
    if not fits or not _is_readable(tensor):
        return None
    count = tensor.shape[0]
    on_disk = BaseRows.of(tensor)
    for ours, theirs in zip(blocks(weight[:count], on_disk.block_rows), on_disk.blocks(), strict=True):
        if not torch.equal(ours, theirs.to(ours.dtype)):
            return None
    if weight.shape[0] == count:
        return on_disk
    return on_disk.followed_by(weight[count:].detach().cpu().clone())


def _is_readable(tensor: StoredTensor) -> bool:
    """Whether rows can be read where they lie: their dtype is known, and they lie one after another."""
    return tensor.dtype in TORCH_DTYPES and tensor.start is not None


def _same_samples(checkpoint: Checkpoint, file_name: str, live: LiveModel, name: str) -> bool:
    tensor = live.tensor(name)
    if checkpoint.tensors[file_name].shape != tuple(tensor.shape) or not tensor.is_floating_point():
        return True  # quantised in memory, say: the fingerprint will hold the checkpoint's own bytes
    positions = sample_positions(tuple(tensor.shape))
    return not len(positions) or live.agrees(name, positions, checkpoint.values(file_name, positions))


def _take(source: TensorSource, embedding: str, prefix: str, vocab_size: int, names: list[str]) -> Fingerprint:
    return Fingerprint.compute(
        source, embedding=embedding, prefix=prefix, vocab_size=vocab_size, token_ids=np.empty(0, np.int32), names=names
    )


def _float32(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().float().numpy()
