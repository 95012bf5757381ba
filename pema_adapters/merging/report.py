"""What a merge did, or would do."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MergeReport:
    """The outcome of a merge; every field is ready for JSON.

    output, base, delta: folders. rows_merged: K. vocab_size: V of the output.
    tensors_changed: tensors of the output with bytes of the delta (rows, replaced, new); tensors_copied: the others,
    byte for byte the base's; tensors_folded: of those changed, the weights with a weight-space method folded in
    (a bias that it scales goes along).
    adapters_left: names below `OUTPUT/adapters`, whose weights cannot go into the checkpoint.
    bytes_written: size of all files (of a dry run: what it would be; in place: of all changes).
    max_rounding_error: largest absolute change of
    a value by a cast to the base's dtype, 0.0 without casts. notes: decisions taken, one sentence each.
    """

    output: str
    base: str
    delta: str
    rows_merged: int
    vocab_size: int
    tensors_changed: int
    tensors_copied: int
    tensors_folded: int
    adapters_left: tuple[str, ...]
    bytes_written: int
    max_rounding_error: float
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that `json.dumps` takes."""
        return {**asdict(self), "adapters_left": list(self.adapters_left), "notes": list(self.notes)}
