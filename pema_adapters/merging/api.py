"""`merge_checkpoint`: read, check, plan, write. Every refusal comes before the first byte of output."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.delta import read_delta
from pema_adapters.formats.delta_discovery import MERGE_MANIFEST
from pema_adapters.hub.card import README
from pema_adapters.io.input_file import record_inputs
from pema_adapters.io.locking import BUSY, check_platform, hold_lock
from pema_adapters.io.progress import ProgressBar
from pema_adapters.merging.in_place.undo_journal import PATCHING, read_state
from pema_adapters.merging.job import Inputs, Merge, MergeOptions
from pema_adapters.merging.output.free_space import check_space
from pema_adapters.merging.output.manifest import encode_manifest
from pema_adapters.merging.output.model_card import folder_card
from pema_adapters.merging.output.staging import DEFAULT, check_replaceable, check_target, stage_output
from pema_adapters.merging.output.verify import verify_plan
from pema_adapters.merging.output.writer import write_plan
from pema_adapters.merging.plan.plan import Plan, PlannedFile
from pema_adapters.merging.plan.segments import BytesSegment
from pema_adapters.merging.planning.base_folder import BaseRequest, locate_base
from pema_adapters.merging.planning.planner import PlanOptions, plan_merge
from pema_adapters.merging.report import MergeReport


def merge_checkpoint(  # noqa: PLR0913 - the public contract
    base: str | Path | None,
    delta: str | Path,
    output: str | Path | None = None,
    *,
    adapter: str | None = None,
    checkpoint: str | int | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    fold: bool = True,
    in_place: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    allow_base_mismatch: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Write the full checkpoint that `base` and `delta` make, as a stream (the paper's E with E' written back).

    Args:
        base: a folder with a checkpoint (safetensors or `.bin`, one file or shards), or a Hub id. None: the one that
            the delta records, as does a short name that ends it ("xlm-v-base" for "facebook/xlm-v-base").
        delta: what `save_adapter`, `save_delta` or a Trainer wrote, a folder that holds exactly one of these up to two
            levels down, or a Hub id.
        output: the folder to write, `delta/merged` by default. It appears complete, or not at all.
        adapter: which one, where `delta` holds several.
        checkpoint: which one of a Trainer's output folder: "latest", "best" (by its trainer_state.json), or a step.
        revision: branch, tag or commit of a Hub base.
        dtype: "float32", "bfloat16" or "float16" for all floating-point tensors; "auto" keeps those of the base.
        fold: fold LoRA, DoRA, (IA)^3 and VeRA into the weights; else they stay an adapter.
        in_place: change the base's own files instead, with a journal from which `undo_merge` restores them.
        overwrite: replace `output` if an earlier merge wrote it.
        dry_run: plan only; write nothing.
        verify: read the output again and compare every byte with base and delta before it is put in place.
        allow_base_mismatch: merge although the delta was trained on another base, or does not say on which.
        progress: show a bar; by default where stderr is a terminal.

    Tensors that the delta does not touch keep their bytes, their order, their file and its metadata. Rows and backbone
    weights take the base's dtype; the report tells the largest rounding error.

    Raises:
        MergeError: refused, or failed; then nothing is left behind.
        FormatError: base or delta is damaged or not what it should be.
        BaseMismatchError: the delta was trained on another base.
    """
    choices = PlanOptions(dtype, fold, allow_base_mismatch, in_place)
    options = MergeOptions(choices, adapter, revision, overwrite, dry_run, verify, progress, checkpoint=checkpoint)
    try:
        base = None if base is None else str(base)
        return _merge(base, str(delta), None if output is None else Path(output), options)
    except OSError as error:
        raise MergeError(f"{error.filename or output or base}: {error.strerror or error}") from error


def undo_merge(base: str | Path) -> None:
    """Restore a base that was merged in place, byte for byte. Raises `MergeError` where there is nothing to undo."""
    from pema_adapters.merging.in_place.execute import undo

    check_platform()
    try:
        undo(Path(base))
    except OSError as error:
        raise MergeError(f"{error.filename or base}: {error.strerror or error}") from error


def _merge(base: str | None, delta: str, output: Path | None, options: MergeOptions) -> MergeReport:
    check_platform()
    start = time.perf_counter()
    with open_inputs(base, delta, options, is_output_needed=output is None and not options.choices.in_place) as inputs:
        if options.choices.in_place:
            return _in_place(inputs, output, options, start)
        merge = prepare_merge(inputs, inputs.delta_folder / DEFAULT if output is None else output, options)
        if options.dry_run:
            return report_dry_run(merge, start)
        return write_merge(merge, options, start)


@contextmanager
def open_inputs(base: str | None, delta: str, options: MergeOptions, is_output_needed: bool) -> Iterator[Inputs]:
    """Find or download base and delta, and lock both against merges in place during the block.

    Raises `MergeError`, `FormatError`.
    """
    delta_folder = _delta_folder(delta, options, is_output_needed)
    with ExitStack() as stack:
        if delta_folder.is_dir():
            stack.enter_context(hold_lock(delta_folder, False, BUSY))
        with record_inputs() as files:
            read = read_delta(delta_folder, options.adapter, options.checkpoint)
        request = BaseRequest(base, options.revision, options.token, must_be_folder=options.choices.in_place)
        found = locate_base(request, read)
        if found.folder.is_dir() and not found.folder.samefile(delta_folder):
            stack.enter_context(hold_lock(found.folder, options.choices.in_place and not options.dry_run, BUSY))
        yield Inputs(found.name, delta, found.folder, delta_folder, read, tuple(files), found.notes)


def prepare_merge(inputs: Inputs, output: Path | None, options: MergeOptions) -> Merge:
    """Check all that can be checked, and plan. Raises `PemaError`."""
    base_folder, delta_folder, delta = inputs.base_folder, inputs.delta_folder, inputs.delta
    if read_state(base_folder) == PATCHING:
        raise MergeError(f"{base_folder}: a merge in place was cut off here; put the base back first with --undo")
    target = None if output is None else output.resolve()
    if target is not None:
        deltas = (delta_folder.resolve(), delta.folder.resolve())
        check_target(target, base=base_folder.resolve(), deltas=deltas, overwrite=options.overwrite)
    with record_inputs() as files:
        plan = plan_merge(Checkpoint.open(base_folder), delta, options.choices)
    merge = Merge(plan, _report(plan, str(target or ""), inputs), target, (*inputs.files, *files))
    if target is None:
        return merge
    merge.check_inputs()  # what the card says of config.json is read again
    merge = with_card(merge, folder_card(target, inputs, merge, options))
    check_replaceable(target, options.overwrite, merge.plan.names)
    return merge


def with_card(merge: Merge, card: str) -> Merge:
    """Return the same merge with `card` as the README.md of its output, in place of the base's."""
    readme = PlannedFile(README, (BytesSegment(card.encode(errors="replace")),))
    plan = replace(merge.plan, files=(*(file for file in merge.plan.files if file.name != README), readme))
    return replace(merge, plan=plan, report=replace(merge.report, bytes_written=plan.size))


def write_merge(merge: Merge, options: MergeOptions, start: float) -> MergeReport:
    """Write the output folder; it appears complete or not at all. `start`: of the whole work, by `perf_counter`."""
    plan, report, target = merge.plan, merge.report, merge.target
    assert target is not None
    total = plan.size * (1 + options.verify)
    with (
        stage_output(target, options.overwrite, plan.names) as stage,
        ProgressBar("merging", total, options.progress) as bar,
    ):
        check_space(plan, stage.folder)
        cloned = write_plan(plan, stage.folder, bar.advance)
        merge.check_inputs()
        if options.verify:
            verify_plan(plan, stage.folder, bar.advance)
        report = finish_report(replace(report, notes=report.notes + _note_clones(cloned)), plan, start)
        manifest = PlannedFile(MERGE_MANIFEST, (BytesSegment(encode_manifest(report, stage.folder, plan.names)),))
        write_plan(replace(plan, files=(manifest,)), stage.folder, lambda count: None)
        merge.check_inputs()
    return replace(report, seconds=time.perf_counter() - start, notes=report.notes + tuple(stage.notes))


def _in_place(inputs: Inputs, output: Path | None, options: MergeOptions, start: float) -> MergeReport:
    if output is not None:
        raise MergeError(f"output {output}: a merge in place has no other output than its base; leave out one of them")
    from pema_adapters.merging.in_place.execute import (
        InPlaceMerge,
        check_in_place,
        merge_in_place,
        roll_back_interrupted,
    )

    base = inputs.base_folder
    if not options.dry_run:
        roll_back_interrupted(base)
    check_in_place(base)
    with record_inputs() as files:
        plan = plan_merge(Checkpoint.open(base), inputs.delta, options.choices)
    report = _report(plan, str(base.resolve()), inputs)
    report = replace(report, notes=report.notes + _note_card(base))
    merge = Merge(plan, report, None, (*inputs.files, *files))
    if options.dry_run:
        return report_dry_run(merge, start)
    with ProgressBar("merging in place", plan.size * (1 + options.verify), options.progress) as bar:
        work = InPlaceMerge(plan, base, merge.files, merge.report.to_dict())
        written = merge_in_place(work, options.verify, bar.advance)
    return replace(finish_report(merge.report, plan, start), bytes_written=written)


def _delta_folder(delta: str, options: MergeOptions, is_output_needed: bool) -> Path:
    if Path(delta).exists() or "/" not in delta.strip("./") or delta.startswith(("/", ".")) or delta.endswith("/"):
        return Path(delta)
    from pema_adapters.hub.download import download_delta

    if is_output_needed:
        raise MergeError(f"delta {delta} is on the Hub, not a folder here: say where to write with --output")
    return download_delta(delta, token=options.token)


def _note_card(base: Path) -> tuple[str, ...]:
    return ("README.md was left as it is: it describes the base",) if (base / README).exists() else ()


def _note_clones(cloned: int) -> tuple[str, ...]:
    if not cloned:
        return ()
    return (f"the file system cloned {cloned:,} bytes: they share the base's space on the disk until one side changes",)


def report_dry_run(merge: Merge, start: float) -> MergeReport:
    """Return the report of a dry run, with the rounding error that writing would meet."""
    merge.plan.measure()
    merge.check_inputs()
    return finish_report(merge.report, merge.plan, start)


def _report(plan: Plan, output: str, inputs: Inputs) -> MergeReport:
    return MergeReport(
        output=output,
        base=inputs.base_name,
        delta=str(inputs.delta.folder),
        rows_merged=plan.rows_merged,
        vocab_size=plan.vocab_size,
        tensors_changed=plan.tensors_changed,
        tensors_copied=plan.tensors_copied,
        tensors_folded=plan.tensors_folded,
        adapters_left=plan.adapters_left,
        bytes_written=plan.size,
        max_rounding_error=0.0,
        seconds=0.0,
        notes=(*inputs.notes, *plan.notes),
    )


def finish_report(report: MergeReport, plan: Plan, start: float) -> MergeReport:
    """Return the report of a plan that was read to its end."""
    return replace(report, max_rounding_error=plan.rounding.largest, seconds=time.perf_counter() - start)
