"""Base + delta -> plan: which tensor of which output file comes from where. Nothing is written here."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pema_adapters.errors import BaseMismatchError, MergeError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.delta import Delta
from pema_adapters.formats.safetensors_header import DTYPE_BYTES, FLOATS
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import OUTPUT_BIASES, OUTPUT_MATRICES
from pema_adapters.merging.folding.adapter_layers import Adapted
from pema_adapters.merging.folding.folded_weight import FoldCache, Folded, folded_bias
from pema_adapters.merging.plan.dtype_cast import Rounding
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import Cast, Literal, Rows, Segment, joined, stored_bytes
from pema_adapters.merging.planning.added_shard import Files, apart, behind
from pema_adapters.merging.planning.name_matching import Names, copies_of
from pema_adapters.merging.planning.output_tensor import Entry, header_for
from pema_adapters.merging.planning.vocab_resize import vocab_size

CONV1D = (".c_attn", ".c_fc", ".c_proj")
"""Linear layers that GPT-2 stores as [in, out]."""


class Layout:
    """The weights of the output: the base's tensors in its order and sharding, new ones at the end.

    `entries` holds, per base file, what each of its tensors becomes. `vocab_size` is V of the output, `size` the bytes
    of all tensors, `changed` counts the base's tensors that the delta touches, `added` those that only the delta has,
    `folded` the weights with an update of `layers` folded in. `dtype`: of all floating-point tensors of the output,
    None for the base's own. `apart`: new tensors get a file of their own, so that no other moves.
    """

    def __init__(  # noqa: PLR0913 - what is merged, and how
        self,
        base: Checkpoint,
        delta: Delta,
        names: Names,
        layers: Sequence[Adapted] = (),
        *,
        dtype: str | None = None,
        apart: bool = False,
    ) -> None:
        self.base, self.delta, self.names, self.dtype = base, delta, names, dtype
        self.rounding = Rounding()
        self.notes: list[str] = []
        self.vocab_size = vocab_size(base, delta, names.embedding)
        folded = self._folded(layers)
        self.folded = sum(name.endswith(".weight") for name in folded)
        changed = self._rows() | self._replaced() | folded
        self.changed = len(changed)
        new = self._new() + self._untied()
        self.added = len(new)
        self._files = self._sorted({path: self._of_file(path, changed) for path in base.files}, new, apart)
        self.entries = self._files.entries
        self.size = sum(part.length for made in self.entries.values() for entry in made for part in entry.segments)
        self.grown_bytes = self.size - sum(tensor.nbytes for tensor in base.tensors.values())
        self._note(changed)
        self.notes += self._files.notes
        self._check_unique()

    def files(self) -> list[PlannedFile]:
        """The output's weight files."""
        return [self._file(path, entries) for path, entries in self.entries.items()]

    def output_name(self, path: Path) -> str:
        """What the output calls a file of `entries`."""
        return self._files.names.get(path) or self.base.safetensors_name(path)

    def _sorted(self, entries: dict[Path, list[Entry]], new: list[Entry], is_apart: bool) -> Files:
        if not new:
            return Files(entries)
        if not is_apart or self.base.is_pickled:
            return behind(self.base, entries, new)
        return apart(self.base, entries, new, self.names.prefix if self.names.add_prefix else "")

    def _file(self, path: Path, entries: list[Entry]) -> PlannedFile:
        head = header_for(self.base, path, entries, self._files.starts.get(path))
        parts = [part for entry in entries for part in entry.segments]
        return PlannedFile(self.output_name(path), joined([head, *parts]))

    def _of_file(self, path: Path, changed: dict[str, Entry]) -> list[Entry]:
        entries = (changed.get(tensor.name) or self._untouched(tensor) for tensor in self.base.by_file[path])
        if not self.names.add_prefix:
            return list(entries)
        return [replace(entry, name=self.names.in_output(entry.name)) for entry in entries]

    def _rows(self) -> dict[str, Entry]:
        """E and its stored copies with the trained rows; where V grew, the biases over the vocabulary too."""
        if self.delta.weight is None:
            return {}
        embedding = self.base.tensors[self.names.embedding]
        matrices = [embedding.name, *copies_of(self.base, self.names, bool(self.delta.untied))]
        if len(matrices) > 1:
            self.notes.append(f"the matrix is stored {len(matrices)} times; rows written into all: {_list(matrices)}")
        made = {name: self._spliced(self.base.tensors[name], self.delta.weight) for name in matrices}
        return made | self._grown_biases(embedding.shape[0], matrices)

    def _spliced(self, matrix: StoredTensor, weight: StoredTensor) -> Entry:
        dtype = self._dtype_of(matrix)
        row_bytes = matrix.shape[1] * DTYPE_BYTES[dtype]
        segment = Rows(self._kept(matrix), self._as_dtype(weight, dtype), self.delta.token_ids, row_bytes)
        return Entry(matrix.name, dtype, (self.vocab_size, matrix.shape[1]), (segment,))

    def _grown_biases(self, old: int, matrices: list[str]) -> dict[str, Entry]:
        """The bias of an LM head gets zeros for the new tokens, as resize_token_embeddings gives it."""
        added = self.vocab_size - old
        if not added:
            return {}
        self.notes.append(f"the vocabulary grew from {old} to {self.vocab_size} tokens")
        done = {*matrices, *(self.names.in_base(name) for name in self.delta.checkpoint_tensors)}
        rest = [tensor for tensor in self.base.tensors.values() if tensor.name not in done]
        for tensor in rest:
            if tensor.name.endswith(OUTPUT_MATRICES) and tensor.shape[:1] == (old,):
                raise MergeError(
                    f"{tensor.path}: tensor {tensor.name!r} {list(tensor.shape)} is an output matrix of its own; "
                    f"its rows for the {added} new tokens are not in the delta, so the merge would lose them"
                )
        biases = [t for t in rest if t.name.endswith(OUTPUT_BIASES) and t.shape in ((old,), (1, old))]
        return {bias.name: self._longer(bias, added) for bias in biases}

    def _longer(self, bias: StoredTensor, added: int) -> Entry:
        dtype = self._dtype_of(bias)
        zeros = Literal(bytes(added * DTYPE_BYTES[dtype]))
        return Entry(bias.name, dtype, (*bias.shape[:-1], self.vocab_size), (self._kept(bias), zeros))

    def _folded(self, layers: Sequence[Adapted]) -> dict[str, Entry]:
        """The weights, and the biases of methods that scale outputs, with the adapter's updates folded in."""
        made: dict[str, Entry] = {}
        cache = FoldCache()
        for layer in layers:
            weight = self._adapted(layer, "weight")
            if weight is None or len(weight.shape) != 2 or weight.dtype not in FLOATS:
                found = f"{weight.dtype} {list(weight.shape)}" if weight else "no such tensor"
                raise BaseMismatchError(
                    f"{self.base.folder}: the adapter changes {layer.module}.weight, expected a matrix of floats, "
                    f"found {found}; give the base that the adapter was trained on"
                )
            segment = self._fold(layer, weight, cache)
            made[weight.name] = Entry(weight.name, segment.dtype, weight.shape, (segment,))
            bias = self._adapted(layer, "bias") if segment.update.scales_bias else None
            if bias is not None:
                dtype = self._dtype_of(bias)
                data = folded_bias(segment, np.frombuffer(bias.read(), np.uint8), bias.dtype, dtype)
                made[bias.name] = Entry(bias.name, dtype, bias.shape, (Literal(data),))
        return made

    def _fold(self, layer: Adapted, weight: StoredTensor, cache: FoldCache) -> Folded:
        raw, where = stored_bytes(weight, of_base=True), f"{weight.path}: tensor {weight.name!r}"
        transposed, dtype = self._is_transposed(layer.module), self._dtype_of(weight)
        return Folded(raw, weight.dtype, weight.shape, layer, transposed, dtype, self.rounding, where, cache)

    def _adapted(self, layer: Adapted, part: str) -> StoredTensor | None:
        stored = self.names.in_base(f"{layer.module}.{part}")
        return None if stored is None else self.base.tensors[stored]

    def _is_transposed(self, module: str) -> bool:
        """GPT-2 keeps its linear layers as Conv1D, whose weight is [in, out]."""
        types = [config.get("model_type") for config in (self.base.config, self.delta.config)]
        return "gpt2" in types and module.endswith(CONV1D)

    def _dtype_of(self, tensor: StoredTensor) -> str:
        """The dtype that a tensor of the base has in the output."""
        return self.dtype if self.dtype is not None and tensor.dtype in FLOATS else tensor.dtype

    def _untouched(self, tensor: StoredTensor) -> Entry:
        return Entry(tensor.name, self._dtype_of(tensor), tensor.shape, (self._kept(tensor),))

    def _kept(self, tensor: StoredTensor) -> Segment:
        """The bytes of a tensor of the base, in the output's dtype."""
        raw, dtype = stored_bytes(tensor, of_base=True), self._dtype_of(tensor)
        if dtype == tensor.dtype:
            return raw
        return Cast(raw, tensor.dtype, dtype, self.rounding, f"{tensor.path}: tensor {tensor.name!r}")

    def _replaced(self) -> dict[str, Entry]:
        """The base's tensors that the delta brings whole, in the base's dtype."""
        made = {}
        for tensor in self.delta.checkpoint_tensors.values():
            stored = self.names.in_base(tensor.name)
            if stored is not None and stored != self.names.embedding:
                if stored in made:
                    raise MergeError(f"{tensor.path}: tensor {tensor.name!r} is the second one for {stored!r}")
                made[stored] = self._replacement(tensor, self.base.tensors[stored])
        return made

    def _replacement(self, tensor: StoredTensor, old: StoredTensor) -> Entry:
        if tensor.shape != old.shape:
            if self.names.is_inside(tensor.name):
                raise MergeError(
                    f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but {old.path.name} of the "
                    f"base has {list(old.shape)}; give the base that the delta was trained on"
                )
            self.notes.append(f"head {old.name}: {list(tensor.shape)} takes the place of {list(old.shape)}")
        dtype = self._dtype_of(old)
        return Entry(old.name, dtype, tensor.shape, (self._as_dtype(tensor, dtype),))

    def _new(self) -> list[Entry]:
        """Tensors that the base lacks (heads, mostly), in the delta's dtype; not those that Transformers ties again."""
        missing = [
            tensor for tensor in self.delta.checkpoint_tensors.values() if self.names.in_base(tensor.name) is None
        ]
        names = {tensor.name: self.names.new(tensor.name) for tensor in missing}
        return [self._added(t, names[t.name]) for t in missing if names[t.name] not in self.base.shared]

    def _untied(self) -> list[Entry]:
        """The output matrix that the delta unties: the base's E, unless the base stores it already."""
        name = self.delta.untied
        if not name:
            return []
        matrix = self.base.tensors[self.names.embedding]
        if self.vocab_size > matrix.shape[0]:
            raise MergeError(
                f"{self.delta.folder}: the vocabulary grew to {self.vocab_size} tokens, but the delta has no rows of "
                f"{name!r} for the new ones; train with output_embeddings='tied'"
            )
        self.notes.append(f"{name} keeps the base's matrix and is no longer tied to the embedding")
        if name in self.base.tensors or self.delta.is_output_in_head:
            return []
        return [Entry(name, self._dtype_of(matrix), matrix.shape, (self._kept(matrix),))]

    def _added(self, tensor: StoredTensor, name: str) -> Entry:
        dtype = self.dtype if self.dtype is not None and tensor.dtype in FLOATS else tensor.dtype
        return Entry(name, dtype, tensor.shape, (self._as_dtype(tensor, dtype),))

    def _as_dtype(self, tensor: StoredTensor, dtype: str) -> Segment:
        if tensor.dtype == dtype:
            return stored_bytes(tensor, of_base=False)
        if tensor.dtype not in FLOATS or dtype not in FLOATS:
            raise MergeError(
                f"{tensor.path}: tensor {tensor.name!r} is {tensor.dtype}, but the base has it as {dtype}; "
                f"only {', '.join(FLOATS)} can be turned into each other"
            )
        return Cast.of(tensor, dtype, self.rounding)

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
            (part.given, part.dtype)
            for entry in changed.values()
            for segment in entry.segments
            if isinstance(part := segment.rows if isinstance(segment, Rows) else segment, Cast)
        }
        of = "" if self.dtype else "the base's "  # with --dtype, the user's
        self.notes += [f"the delta's {source} weights were cast to {of}{target}" for source, target in sorted(casts)]


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
