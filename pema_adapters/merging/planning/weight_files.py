"""The weight files of the output: which tensor of which file comes from where. Nothing is written here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.delta import Delta
from pema_adapters.merging.folding.adapter_layers import AdaptedLinear
from pema_adapters.merging.plan.dtype_cast import Rounding
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.planning.name_matching import NameMap
from pema_adapters.merging.planning.output_tensor import OutputTensor
from pema_adapters.merging.planning.tensor_planner import TensorPlanner


@dataclass(frozen=True)
class WeightFiles:
    """The weights of the output: the base's tensors in its order and sharding, new ones at the end.

    Attributes:
        name_map: the delta's names in the base.
        dtype: of all floating-point tensors; None for the base's own.
        tensors: for each file of the base, the tensors that the output has in its place.
        names: the name of each of these files in the output.
        files: the same as planned files.
        vocab_size: V of the output.
        changed: number of the base's tensors that the delta touches.
        added: number of tensors that only the delta has.
        folded: number of weight matrices with an update folded in.
        rounding: the largest rounding error of all casts, known once the files are read.
        notes: for the report.
    """

    name_map: NameMap
    dtype: str | None
    tensors: Mapping[Path, Sequence[OutputTensor]]
    names: Mapping[Path, str]
    files: tuple[PlannedFile, ...]
    vocab_size: int
    changed: int
    added: int
    folded: int
    rounding: Rounding
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(part.length for made in self.tensors.values() for tensor in made for part in tensor.segments)


def plan_weight_files(  # noqa: PLR0913 - what is merged, and how
    base: Checkpoint,
    delta: Delta,
    names: NameMap,
    layers: Sequence[AdaptedLinear] = (),
    *,
    dtype: str | None = None,
    in_place: bool = False,
) -> WeightFiles:
    """Plan which tensor of which output file comes from where.

    Args:
        names: the delta's names in the base.
        layers: linear layers whose weights get an update folded in.
        dtype: of all floating-point tensors of the output; None for the base's own.
        in_place: new tensors get a file of their own, so that no other tensor moves.

    Raises:
        BaseMismatchError: a tensor that the delta changes is not in the base, or has another shape.
        MergeError: the result would lose weights, or hold two tensors of one name.
    """
    planner = TensorPlanner(base, delta, names, dtype)
    vocab_size = planner.vocab_size
    folded = planner.fold_layers(layers)
    changed = planner.splice_rows() | planner.replace_tensors() | folded
    new = planner.add_tensors() + planner.untie_output()
    by_file = planner.sort_by_file(changed, new, in_place)
    planner.note_casts(changed)
    _check_unique(base, by_file.tensors)
    files = {path: planner.plan_file(path, by_file) for path in by_file.tensors}
    return WeightFiles(
        name_map=names,
        dtype=dtype,
        tensors=by_file.tensors,
        names={path: file.name for path, file in files.items()},
        files=tuple(files.values()),
        vocab_size=vocab_size,
        changed=len(changed),
        added=len(new),
        folded=sum(name.endswith(".weight") for name in folded),
        rounding=planner.rounding,
        notes=(*planner.notes, *by_file.notes),
    )


def _check_unique(base: Checkpoint, tensors: Mapping[Path, Sequence[OutputTensor]]) -> None:
    """Raise `MergeError` if two tensors of the output have one name."""
    seen: set[str] = set()
    for name in (tensor.name for made in tensors.values() for tensor in made):
        if name in seen:
            raise MergeError(f"{base.folder}: two tensors would be called {name!r} in the output")
        seen.add(name)
