"""Turn the tensors of base and delta into tensors of the output: spliced, folded, replaced, added, or as they are."""

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
from pema_adapters.formats.weights import safetensors_name
from pema_adapters.merging.folding.adapter_layers import AdaptedLinear
from pema_adapters.merging.folding.folded_weight import FoldCache, FoldedWeight, fold_bias
from pema_adapters.merging.plan.dtype_cast import Rounding
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import (
    BytesSegment,
    CastSegment,
    RowsSegment,
    Segment,
    make_tensor_segment,
    merge_segments,
)
from pema_adapters.merging.planning.added_shard import TensorsByFile, add_shard, append_to_last
from pema_adapters.merging.planning.name_matching import NameMap, find_copies
from pema_adapters.merging.planning.output_tensor import OutputTensor, plan_header
from pema_adapters.merging.planning.vocab_resize import plan_vocab_size

CONV1D = (".c_attn", ".c_fc", ".c_proj")
"""Linear layers that GPT-2 stores as [in, out]."""


class TensorPlanner:
    """Turns tensors of base and delta into tensors of the output, and collects notes."""

    def __init__(self, base: Checkpoint, delta: Delta, names: NameMap, dtype: str | None) -> None:
        self.base, self.delta, self.names, self.dtype = base, delta, names, dtype
        self.rounding, self.notes = Rounding(), list[str]()
        self.vocab_size = plan_vocab_size(base, delta, names.embedding)

    def sort_by_file(self, changed: dict[str, OutputTensor], new: list[OutputTensor], in_place: bool) -> TensorsByFile:
        """Sort the tensors of the output by the base's files."""
        tensors = {path: self._tensors_of_file(path, changed) for path in self.base.files}
        if not new:
            return TensorsByFile(tensors)
        if not in_place or self.base.is_pickled:
            return append_to_last(self.base, tensors, new)
        return add_shard(self.base, tensors, new, self.names.prefix if self.names.add_prefix else "")

    def plan_file(self, path: Path, by_file: TensorsByFile) -> PlannedFile:
        """Plan the output file that takes the place of `path`."""
        tensors = by_file.tensors[path]
        header = plan_header(self.base, path, tensors, by_file.starts.get(path))
        parts = [part for tensor in tensors for part in tensor.segments]
        name = by_file.names.get(path) or safetensors_name(path.name)
        return PlannedFile(name, merge_segments([header, *parts]))

    def _tensors_of_file(self, path: Path, changed: dict[str, OutputTensor]) -> list[OutputTensor]:
        tensors = (changed.get(tensor.name) or self._copy_tensor(tensor) for tensor in self.base.by_file[path])
        if not self.names.add_prefix:
            return list(tensors)
        return [replace(tensor, name=self.names.in_output(tensor.name)) for tensor in tensors]

    def splice_rows(self) -> dict[str, OutputTensor]:
        """Write the trained rows into E and its stored copies; where V grew, extend biases over the vocabulary too."""
        if self.delta.weight is None:
            return {}
        embedding = self.base.tensors[self.names.embedding]
        matrices = [embedding.name, *find_copies(self.base, self.names, bool(self.delta.untied))]
        if len(matrices) > 1:
            self.notes.append(f"the matrix is stored {len(matrices)} times; rows written into all: {_list(matrices)}")
        made = {name: self._splice(self.base.tensors[name], self.delta.weight) for name in matrices}
        return made | self._grow_biases(embedding.shape[0], matrices)

    def _splice(self, matrix: StoredTensor, weight: StoredTensor) -> OutputTensor:
        dtype = self._output_dtype(matrix)
        row_bytes = matrix.shape[1] * DTYPE_BYTES[dtype]
        segment = RowsSegment(self._copy_bytes(matrix), self._cast_to(weight, dtype), self.delta.token_ids, row_bytes)
        return OutputTensor(matrix.name, dtype, (self.vocab_size, matrix.shape[1]), (segment,))

    def _grow_biases(self, old: int, matrices: list[str]) -> dict[str, OutputTensor]:
        """Extend the bias of an LM head with zeros for the new tokens, as resize_token_embeddings does."""
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
        return {bias.name: self._append_zeros(bias, added) for bias in biases}

    def _append_zeros(self, bias: StoredTensor, added: int) -> OutputTensor:
        dtype = self._output_dtype(bias)
        zeros = BytesSegment(bytes(added * DTYPE_BYTES[dtype]))
        return OutputTensor(bias.name, dtype, (*bias.shape[:-1], self.vocab_size), (self._copy_bytes(bias), zeros))

    def fold_layers(self, layers: Sequence[AdaptedLinear]) -> dict[str, OutputTensor]:
        """Fold the adapter's updates into the weights, and into the biases of methods that scale outputs."""
        made: dict[str, OutputTensor] = {}
        cache = FoldCache()
        for layer in layers:
            weight = self._base_tensor(layer, "weight")
            if weight is None or len(weight.shape) != 2 or weight.dtype not in FLOATS:
                found = f"{weight.dtype} {list(weight.shape)}" if weight else "no such tensor"
                raise BaseMismatchError(
                    f"{self.base.folder}: the adapter changes {layer.module}.weight, expected a matrix of floats, "
                    f"found {found}; give the base that the adapter was trained on"
                )
            segment = self._fold(layer, weight, cache)
            made[weight.name] = OutputTensor(weight.name, segment.dtype, weight.shape, (segment,))
            bias = self._base_tensor(layer, "bias") if segment.update.scales_bias else None
            if bias is not None:
                dtype = self._output_dtype(bias)
                data = fold_bias(segment, np.frombuffer(bias.read(), np.uint8), bias.dtype, dtype)
                made[bias.name] = OutputTensor(bias.name, dtype, bias.shape, (BytesSegment(data),))
        return made

    def _fold(self, layer: AdaptedLinear, weight: StoredTensor, cache: FoldCache) -> FoldedWeight:
        raw, where = make_tensor_segment(weight, of_base=True), f"{weight.path}: tensor {weight.name!r}"
        transposed, dtype = self._is_transposed(layer.module), self._output_dtype(weight)
        return FoldedWeight(raw, weight.dtype, weight.shape, layer, transposed, dtype, self.rounding, where, cache)

    def _base_tensor(self, layer: AdaptedLinear, part: str) -> StoredTensor | None:
        stored = self.names.in_base(f"{layer.module}.{part}")
        return None if stored is None else self.base.tensors[stored]

    def _is_transposed(self, module: str) -> bool:
        """Return whether a weight is [in, out]: GPT-2 keeps its linear layers as Conv1D."""
        types = [config.get("model_type") for config in (self.base.config, self.delta.config)]
        return "gpt2" in types and module.endswith(CONV1D)

    def _output_dtype(self, tensor: StoredTensor) -> str:
        """Return the dtype that a tensor of the base has in the output."""
        return self.dtype if self.dtype is not None and tensor.dtype in FLOATS else tensor.dtype

    def _copy_tensor(self, tensor: StoredTensor) -> OutputTensor:
        return OutputTensor(tensor.name, self._output_dtype(tensor), tensor.shape, (self._copy_bytes(tensor),))

    def _copy_bytes(self, tensor: StoredTensor) -> Segment:
        """Return the bytes of a tensor of the base, in the output's dtype."""
        raw, dtype = make_tensor_segment(tensor, of_base=True), self._output_dtype(tensor)
        if dtype == tensor.dtype:
            return raw
        return CastSegment(raw, tensor.dtype, dtype, self.rounding, f"{tensor.path}: tensor {tensor.name!r}")

    def replace_tensors(self) -> dict[str, OutputTensor]:
        """Replace the base's tensors that the delta holds as a whole, in the base's dtype."""
        made = {}
        for tensor in self.delta.checkpoint_tensors.values():
            stored = self.names.in_base(tensor.name)
            if stored is not None and stored != self.names.embedding:
                if stored in made:
                    raise MergeError(f"{tensor.path}: tensor {tensor.name!r} is the second one for {stored!r}")
                made[stored] = self._replace_tensor(tensor, self.base.tensors[stored])
        return made

    def _replace_tensor(self, tensor: StoredTensor, old: StoredTensor) -> OutputTensor:
        if tensor.shape != old.shape:
            if self.names.is_inside(tensor.name):
                raise MergeError(
                    f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but {old.path.name} of the "
                    f"base has {list(old.shape)}; give the base that the delta was trained on"
                )
            self.notes.append(f"head {old.name}: {list(tensor.shape)} takes the place of {list(old.shape)}")
        dtype = self._output_dtype(old)
        return OutputTensor(old.name, dtype, tensor.shape, (self._cast_to(tensor, dtype),))

    def add_tensors(self) -> list[OutputTensor]:
        """Add tensors that the base lacks (heads, mostly), in the delta's dtype; Transformers ties the rest again."""
        missing = [
            tensor for tensor in self.delta.checkpoint_tensors.values() if self.names.in_base(tensor.name) is None
        ]
        names = {tensor.name: self.names.new(tensor.name) for tensor in missing}
        return [self._add_tensor(t, names[t.name]) for t in missing if names[t.name] not in self.base.shared]

    def untie_output(self) -> list[OutputTensor]:
        """Add the output matrix that the delta unties: the base's E, unless the base stores it already."""
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
        return [OutputTensor(name, self._output_dtype(matrix), matrix.shape, (self._copy_bytes(matrix),))]

    def _add_tensor(self, tensor: StoredTensor, name: str) -> OutputTensor:
        dtype = self.dtype if self.dtype is not None and tensor.dtype in FLOATS else tensor.dtype
        return OutputTensor(name, dtype, tensor.shape, (self._cast_to(tensor, dtype),))

    def _cast_to(self, tensor: StoredTensor, dtype: str) -> Segment:
        if tensor.dtype == dtype:
            return make_tensor_segment(tensor, of_base=False)
        if tensor.dtype not in FLOATS or dtype not in FLOATS:
            raise MergeError(
                f"{tensor.path}: tensor {tensor.name!r} is {tensor.dtype}, but the base has it as {dtype}; "
                f"only {', '.join(FLOATS)} can be turned into each other"
            )
        return CastSegment.of(tensor, dtype, self.rounding)

    def note_casts(self, changed: dict[str, OutputTensor]) -> None:
        """Note names that get a prefix, and dtypes that change."""
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
            if isinstance(part := segment.rows if isinstance(segment, RowsSegment) else segment, CastSegment)
        }
        of = "" if self.dtype else "the base's "  # with --dtype, the user's
        self.notes += [f"the delta's {source} weights were cast to {of}{target}" for source, target in sorted(casts)]


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
