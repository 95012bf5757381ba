"""One merge: how it was asked for, what it reads, and what is planned."""

from dataclasses import dataclass
from pathlib import Path

from pema_adapters.formats.delta import Delta
from pema_adapters.io.input_file import InputFile, check_unchanged
from pema_adapters.merging.plan.plan import Plan
from pema_adapters.merging.planning.planner import PlanOptions
from pema_adapters.merging.report import MergeReport


@dataclass(frozen=True)
class MergeOptions:
    """How to merge; see `merge_checkpoint`."""

    choices: PlanOptions
    adapter: str | None
    revision: str | None
    overwrite: bool
    dry_run: bool
    verify: bool
    progress: bool | None
    token: str | bool | None = None
    checkpoint: str | int | None = None


@dataclass(frozen=True)
class Inputs:
    """What is merged, found and read.

    base_name: folder or Hub id. delta_name: as given. delta_folder: where the delta lies, or a folder around it.
    files: those of the delta that were read. notes: how the base was found.
    """

    base_name: str
    delta_name: str
    base_folder: Path
    delta_folder: Path
    delta: Delta
    files: tuple[InputFile, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Merge:
    """A merge that is checked and planned; nothing is written yet.

    target: the folder to write, None for none. files: all that the plan was made from and is read from.
    """

    plan: Plan
    report: MergeReport
    target: Path | None
    files: tuple[InputFile, ...]

    def check_inputs(self) -> None:
        """Raise `InputChangedError` if a file of base or delta has changed since it was opened."""
        check_unchanged(self.files)
