"""Base + delta -> plan: which tensor of which output file comes from where. Nothing is written here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pema_adapters.errors import BaseMismatchError, MergeError
from pema_adapters.formats.artifact import Delta
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.safetensors_file import DTYPE_BYTES, FLOATS, TensorInfo, encode_header, read_header
from pema_adapters.formats.tensors import Stored
from pema_adapters.merging.casting import Rounding
from pema_adapters.merging.names import OUTPUT_BIASES, OUTPUT_MATRICES, Names, copies_of
from pema_adapters.merging.plan import Cast, Copy, Literal, PlannedFile, Rows, Segment, joined


@dataclass(frozen=True)
class Entry:
    """A tensor of the output, and the segments that its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


class Layout:
    """The weights of the output: the base's tensors in its order and sharding, new ones at the end.

    `entries` holds, per base file, what each of its tensors becomes. `vocab_size` is V of the output, `changed` counts
    the base's tensors that the delta touches, `added` those that only the delta has.
    """

    def __init__(self, base: Checkpoint, delta: Delta, names: Names) -> None:
        self.base, self.delta, self.names = base, delta, names
        self.rounding = Rounding()
        self.notes: list[str] = []
        self.vocab_size = _vocab_size(base, delta, names)
        changed = self._rows() | self._replaced()
        self.changed = len(changed)
        self.entries = {path: self._of_file(path, changed) for path in base.files}
        new = self._new()
        self.added = len(new)
        self.entries[base.files[-1]] += new
        self.grown_bytes = self._size() - sum(tensor.nbytes for tensor in base.tensors.values())
        self._note(changed)
        self._check_unique()

    def files(self) -> list[PlannedFile]:
        """The output's weight files."""
        return [self._file(path, entries) for path, entries in self.entries.items()]

    def _file(self, path: Path, entries: list[Entry]) -> PlannedFile:
        header = read_header(path)
        after = [(entry.name, entry.dtype, entry.shape) for entry in entries]
        before = [(tensor.name, tensor.dtype, tensor.shape) for tensor in header.tensors.values()]
        same = Copy(path, 0, header.data_start)
        head = same if after == before else Literal(encode_header(after, header.metadata))
        return PlannedFile(path.name, joined([head, *(part for entry in entries for part in entry.segments)]))

    def _of_file(self, path: Path, changed: dict[str, Entry]) -> list[Entry]:
        found = (tensor for tensor in self.base.tensors.values() if tensor.path == path)
        entries = (changed.get(tensor.name, _untouched(tensor)) for tensor in found)
        return [replace(entry, name=self.names.in_output(entry.name)) for entry in entries]

    def _rows(self) -> dict[str, Entry]:
        """E and its stored copies with the trained rows; where V grew, the biases over the vocabulary too."""
        embedding = self.base.tensors[self.names.embedding]
        matrices = [embedding.name, *copies_of(self.base, self.names)]
        if len(matrices) > 1:
            self.notes.append(f"the matrix is stored {len(matrices)} times; rows written into all: {_list(matrices)}")
        made = {name: self._spliced(self.base.tensors[name]) for name in matrices}
        return made | self._grown_biases(embedding.shape[0], matrices)

    def _spliced(self, matrix: TensorInfo) -> Entry:
        rows = self._as_dtype(self.delta.weight, matrix)
        row_bytes = matrix.shape[1] * DTYPE_BYTES[matrix.dtype]
        segment = Rows(_copy(matrix), rows, self.delta.token_ids, row_bytes)
        return Entry(matrix.name, matrix.dtype, (self.vocab_size, matrix.shape[1]), (segment,))

    def _grown_biases(self, old: int, matrices: list[str]) -> dict[str, Entry]:
        """The bias of an LM head gets zeros for the new tokens, as resize_token_embeddings gives it."""
        added = self.vocab_size - old
        if not added:
            return {}
        self.notes.append(f"the vocabulary grew from {old} to {self.vocab_size} tokens")
        rest = [t for t in self.base.tensors.values() if t.name not in matrices and not self._is_replaced(t.name)]
        for tensor in rest:
            if tensor.name.endswith(OUTPUT_MATRICES) and tensor.shape[:1] == (old,):
                raise MergeError(
                    f"{tensor.path}: tensor {tensor.name!r} {list(tensor.shape)} is an output matrix of its own; "
                    f"its rows for the {added} new tokens are not in the delta, so the merge would lose them"
                )
        biases = [t for t in rest if t.name.endswith(OUTPUT_BIASES) and t.shape in ((old,), (1, old))]
        return {bias.name: self._longer(bias, added) for bias in biases}

    def _longer(self, bias: TensorInfo, added: int) -> Entry:
        zeros = Literal(bytes(added * DTYPE_BYTES[bias.dtype]))
        return Entry(bias.name, bias.dtype, (*bias.shape[:-1], self.vocab_size), (_copy(bias), zeros))

    def _is_replaced(self, stored: str) -> bool:
        return any(self.names.in_base(name) == stored for name in self.delta.ordinary)

    def _replaced(self) -> dict[str, Entry]:
        """The base's tensors that the delta brings whole, in the base's dtype."""
        made = {}
        for tensor in self.delta.ordinary.values():
            stored = self.names.in_base(tensor.name)
            if stored is not None and stored != self.names.embedding:
                made[stored] = self._replacement(tensor, self.base.tensors[stored])
        return made

    def _replacement(self, tensor: Stored, old: TensorInfo) -> Entry:
        if tensor.shape != old.shape:
            if self.names.is_inside(tensor.name):
                raise MergeError(
                    f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but {old.path.name} of the "
                    f"base has {list(old.shape)}; give the base that the delta was trained on"
                )
            self.notes.append(f"head {old.name}: {list(tensor.shape)} takes the place of {list(old.shape)}")
        return Entry(old.name, old.dtype, tensor.shape, (self._as_dtype(tensor, old),))

    def _new(self) -> list[Entry]:
        """Tensors that the base lacks (heads, mostly), in the delta's dtype."""
        new = [tensor for tensor in self.delta.ordinary.values() if self.names.in_base(tensor.name) is None]
        return [Entry(self.names.new(t.name), t.dtype, t.shape, (Literal(t.raw.data),)) for t in new]

    def _as_dtype(self, tensor: Stored, wanted: TensorInfo) -> Literal | Cast:
        if tensor.dtype == wanted.dtype:
            return Literal(tensor.raw.data)
        if tensor.dtype not in FLOATS or wanted.dtype not in FLOATS:
            raise MergeError(
                f"{tensor.path}: tensor {tensor.name!r} is {tensor.dtype}, but {wanted.name!r} of the base "
                f"is {wanted.dtype}; only {', '.join(FLOATS)} can be turned into each other"
            )
        return Cast(tensor, wanted.dtype, self.rounding)

    def _size(self) -> int:
        return sum(part.length for entries in self.entries.values() for entry in entries for part in entry.segments)

    def _check_unique(self) -> None:
        seen: set[str] = set()
        for name in (entry.name for entries in self.entries.values() for entry in entries):
            if name in seen:
                raise MergeError(f"{self.base.folder}: two tensors would be called {name!r} in the output")
            seen.add(name)

    def _note(self, changed: dict[str, Entry]) -> None:
        if self.names.add_prefix:
            prefix, example = self.names.prefix, self.names.embedding
            self.notes.append(
                f"all names of the base get the prefix {prefix!r} ({example} is now {prefix}.{example}): "
                "beside a head, Transformers finds them only so"
            )
        casts = {
            (part.tensor.dtype, part.dtype)
            for entry in changed.values()
            for segment in entry.segments
            if isinstance(part := segment.rows if isinstance(segment, Rows) else segment, Cast)
        }
        self.notes += [
            f"the delta's {source} weights were cast to the base's {target}" for source, target in sorted(casts)
        ]


def _vocab_size(base: Checkpoint, delta: Delta, names: Names) -> int:
    """V of the output, after checking that the rows fit the matrix."""
    matrix = base.tensors[names.embedding]
    where = f"{matrix.path}: tensor {matrix.name!r} {matrix.dtype} {list(matrix.shape)}"
    if len(matrix.shape) != 2 or matrix.dtype not in FLOATS or matrix.shape[1] != delta.weight.shape[1]:
        raise BaseMismatchError(
            f"{where} cannot take rows of {delta.weight.shape[1]} numbers; give the base that the delta was trained on"
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
        raise MergeError(
            f"{delta.weight.path}: rows for the new tokens {rows} to {fingerprint.vocab_size - 1} are missing"
        )
    return fingerprint.vocab_size


def _check_last(where: str, token_ids: np.ndarray, rows: int) -> None:
    if len(token_ids) and token_ids[-1] >= rows:
        raise BaseMismatchError(f"{where}: the delta has a row for token {token_ids[-1]}; expected ids below {rows}")


def _untouched(tensor: TensorInfo) -> Entry:
    return Entry(tensor.name, tensor.dtype, tensor.shape, (_copy(tensor),))


def _copy(tensor: TensorInfo) -> Copy:
    return Copy(tensor.path, tensor.start, tensor.nbytes)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
