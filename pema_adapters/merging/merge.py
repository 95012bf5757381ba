"""`merge_checkpoint`: read, check, plan, write. Every refusal comes before the first byte of output."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from pema_adapters.errors import MergeError
from pema_adapters.formats.artifact import Delta, read_delta
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.find import MARKER
from pema_adapters.merging.layout import Layout
from pema_adapters.merging.names import match_names
from pema_adapters.merging.others import carried_files, left_files
from pema_adapters.merging.plan import Plan
from pema_adapters.merging.progress import bar
from pema_adapters.merging.report import MergeReport
from pema_adapters.merging.settings import config_file, index_file, json_file
from pema_adapters.merging.target import DEFAULT, check_space, check_target, staged
from pema_adapters.merging.verify import verify_plan
from pema_adapters.merging.write import write_plan


@dataclass(frozen=True)
class Options:
    """How to merge; see `merge_checkpoint`."""

    adapter: str | None = None
    revision: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    verify: bool = False
    allow_base_mismatch: bool = False
    progress: bool | None = None


def merge_checkpoint(  # noqa: PLR0913 - the public contract
    base: str | Path,
    delta: str | Path,
    output: str | Path | None = None,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    allow_base_mismatch: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Write the full checkpoint that `base` and `delta` make, as a stream (the paper's E with E' written back).

    Args:
        base: a folder with a safetensors checkpoint, or a Hub id.
        delta: what `save_adapter`, `save_delta` or a Trainer wrote, or a folder that holds exactly one of these.
        output: the folder to write, `delta/merged` by default. It appears complete, or not at all.
        adapter: which one, where `delta` holds several.
        revision: branch, tag or commit of a Hub base.
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
    options = Options(adapter, revision, overwrite, dry_run, verify, allow_base_mismatch, progress)
    try:
        return _merge(base, Path(delta), None if output is None else Path(output), options)
    except OSError as error:
        where = error.filename or output or delta
        raise MergeError(f"{where}: {error.strerror or error}; nothing was left behind") from error


def _merge(base: str | Path, delta_folder: Path, output: Path | None, options: Options) -> MergeReport:
    start = time.perf_counter()
    delta = read_delta(delta_folder, options.adapter)
    base_folder = _base_folder(base, options.revision)
    target = (delta_folder / DEFAULT if output is None else output).resolve()
    deltas = (delta_folder.resolve(), delta.folder.resolve())
    check_target(target, base=base_folder.resolve(), deltas=deltas, overwrite=options.overwrite)
    plan = plan_merge(Checkpoint.open(base_folder), delta, options.allow_base_mismatch)
    check_space(target, plan.size)
    report = _report(plan, target, str(base), delta)
    if options.dry_run:
        for cast in plan.casts():
            cast.measure()
        return _finished(report, plan, start)
    total = plan.size * (1 + options.verify)
    with staged(target, options.overwrite) as stage, bar("merging", total, options.progress) as advance:
        write_plan(plan, stage, advance)
        if options.verify:
            verify_plan(plan, stage, advance)
        report = _finished(report, plan, start)
        write_plan(replace(plan, files=(json_file(MARKER, report.to_dict()),)), stage, lambda count: None)
    return replace(report, seconds=time.perf_counter() - start)


def plan_merge(base: Checkpoint, delta: Delta, allow_base_mismatch: bool = False) -> Plan:
    """Check that the delta belongs to the base, and plan every file of the output."""
    mismatch = _check_base(base, delta, allow_base_mismatch)
    layout = Layout(base, delta, match_names(base, delta))
    left = left_files(delta)
    settings = [file for file in (config_file(base, delta, layout), index_file(base, layout)) if file]
    return Plan(
        files=(*carried_files(base.folder), *layout.files(), *left, *settings),
        rounding=layout.rounding,
        rows_merged=len(delta.token_ids),
        vocab_size=layout.vocab_size,
        tensors_changed=layout.changed + layout.added,
        tensors_copied=len(base.tensors) - layout.changed,
        adapters_left=(delta.name,) if left else (),
        notes=(*mismatch, *layout.notes, *_about_left(delta)),
    )


def _base_folder(base: str | Path, revision: str | None) -> Path:
    if Path(base).exists():
        return Path(base)
    from pema_adapters.merging.resolve import from_hub

    return from_hub(str(base), revision)


def _check_base(base: Checkpoint, delta: Delta, allow: bool) -> list[str]:
    """Compare the base with the delta's fingerprint. Returns what there is to note if a mismatch is allowed."""
    from pema_adapters.errors import BaseMismatchError

    try:
        if delta.fingerprint is None:
            raise BaseMismatchError(
                f"{delta.weight.path}: no fingerprint of the base it was trained on, so it may belong to another; "
                "insist with --allow-base-mismatch"
            )
        delta.fingerprint.check(base, delta.token_ids, where=str(base.folder))
    except BaseMismatchError as error:
        if not allow:
            raise
        return [f"merged all the same: {error}"]
    return []


def _about_left(delta: Delta) -> list[str]:
    notes = []
    if delta.rest.config is not None:
        notes.append(f"the other weights of adapter {delta.name!r} stay an adapter, in adapters/{delta.name}")
    if delta.head is not None and not delta.head.is_static:
        notes.append(f"its flexible head stays in adapters/{delta.name}, for AutoAdapterModel's load_head")
    return notes


def _report(plan: Plan, target: Path, base: str, delta: Delta) -> MergeReport:
    return MergeReport(
        output=str(target),
        base=base,
        delta=str(delta.folder),
        rows_merged=plan.rows_merged,
        vocab_size=plan.vocab_size,
        tensors_changed=plan.tensors_changed,
        tensors_copied=plan.tensors_copied,
        tensors_folded=0,
        adapters_left=plan.adapters_left,
        bytes_written=plan.size,
        max_rounding_error=0.0,
        seconds=0.0,
        notes=plan.notes,
    )


def _finished(report: MergeReport, plan: Plan, start: float) -> MergeReport:
    return replace(report, max_rounding_error=plan.rounding.largest, seconds=time.perf_counter() - start)
