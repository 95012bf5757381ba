"""A merged checkpoint onto the Hub: one commit, uploaded straight from the plan, or from the folder just written."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema_adapters.errors import MergeError, PemaError
from pema_adapters.hub.card import README, decode_card, has_pema_section
from pema_adapters.hub.errors import explain, is_conflict, iterate_causes
from pema_adapters.hub.retry import with_retry
from pema_adapters.hub.token import check_token
from pema_adapters.io.locking import check_platform
from pema_adapters.io.progress import Advance, ProgressBar
from pema_adapters.merging.api import (
    finish_report,
    open_inputs,
    prepare_merge,
    report_dry_run,
    with_card,
    write_merge,
)
from pema_adapters.merging.job import Inputs, Merge, MergeOptions
from pema_adapters.merging.output.model_card import hub_card
from pema_adapters.merging.plan.plan import Plan
from pema_adapters.merging.planning.auxiliary_files import ADAPTERS
from pema_adapters.merging.planning.planner import PlanOptions
from pema_adapters.merging.report import MergeReport
from pema_adapters.publishing.plan_stream import open_stream

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

MESSAGE = "Upload a checkpoint merged with pema_adapters"
TRIES = 5
"""Commits that are tried where others push to the repository meanwhile."""
_STALE = (".safetensors", ".bin", ".index.json")


@dataclass(frozen=True)
class _Head:
    """What a push is planned against: the newest commit of the repository, its files, and its card."""

    commit: str | None
    files: list[str]
    card: str


@dataclass(frozen=True)
class _Target:
    """Where to push; `name` is the repository's."""

    name: str
    private: bool | None
    create_pr: bool
    message: str
    api: "HfApi"


def push_merged_to_hub(  # noqa: PLR0913 - merge_checkpoint's arguments, and those of push_to_hub
    base: str | Path | None,
    delta: str | Path,
    repo_id: str,
    output: str | Path | None = None,
    *,
    adapter: str | None = None,
    checkpoint: str | int | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    fold: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    allow_base_mismatch: bool = False,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    progress: bool | None = None,
) -> MergeReport:
    """Merge, and push the checkpoint with its card to the Hub as one commit.

    Without `output` no merged copy lies on the disk: the client reads each file from the plan, once for its sha256 and
    once to upload it. What is uploaded already is not sent again by the next run. Weights that an earlier commit had in
    other files are deleted by the same commit. Where somebody else commits meanwhile, the card and the deletions are
    planned again on top of that commit.

    Args:
        base, delta, output, adapter, checkpoint, revision, dtype, fold, overwrite, verify, allow_base_mismatch,
            progress: as for `merge_checkpoint`; `output` and what goes with it only where a copy on the disk is wanted
            as well.
        repo_id: the repository; made if there is none. Its README.md keeps all sections but ours.
        dry_run: plan only; ask nothing of the Hub but base and delta.
        private: whether a new repository is private; by default what the organisation says.
        create_pr: open a pull request instead of committing to the main branch.
        commit_message: the first line of the commit.
        token: for all that is asked of the Hub; by default the one that `hf auth login` or HF_TOKEN gives.

    Returns:
        The report; `output` is the folder, or the page of the repository, and the last note says which commit.

    Raises:
        MergeError: refused, or the push failed; the repository has all of it, or is as it was (a new one is empty).
        FormatError, BaseMismatchError: as for `merge_checkpoint`.
    """
    token = check_token(token)
    choices = PlanOptions(dtype, fold, allow_base_mismatch)
    options = MergeOptions(choices, adapter, revision, overwrite, dry_run, verify, progress, token, checkpoint)
    base = None if base is None else str(base)
    try:
        return _push(base, str(delta), output, _target(repo_id, private, create_pr, commit_message, token), options)
    except OSError as error:
        raise MergeError(f"{error.filename or repo_id}: {error.strerror or error}; nothing was pushed") from error


def _target(
    repo_id: str, private: bool | None, create_pr: bool, message: str | None, token: str | bool | None
) -> _Target:
    from huggingface_hub import HfApi

    return _Target(repo_id, private, create_pr, message or MESSAGE, HfApi(token=token))


def _push(
    base: str | None, delta: str, output: str | Path | None, target: _Target, options: MergeOptions
) -> MergeReport:
    check_platform()
    start = time.perf_counter()
    with open_inputs(base, delta, options, is_output_needed=False) as inputs:
        merge = prepare_merge(inputs, None if output is None else Path(output), options)
        return report_dry_run(merge, start) if options.dry_run else _send(merge, inputs, target, options, start)


def _send(merge: Merge, inputs: Inputs, target: _Target, options: MergeOptions, start: float) -> MergeReport:
    with _explain_errors(target.name):
        url = with_retry(lambda: target.api.create_repo(target.name, private=target.private, exist_ok=True))
        target = replace(target, name=url.repo_id)
        head = _read_head(target)
    merge = _with_card(merge, target, inputs, options, head)
    report = merge.report
    if merge.target is not None:
        report = write_merge(merge, options, start)
    for _ in range(TRIES):
        made = _commit(target, merge, head, options)
        if made is not None:
            report = finish_report(merge.report if merge.target is None else report, merge.plan, start)
            return replace(report, output=report.output or str(url), notes=(*report.notes, _note_commit(made)))
        with _explain_errors(target.name):
            head = _read_head(target)
        merge = _with_card(merge, target, inputs, options, head)
    raise MergeError(
        f"{target.name}: somebody else pushed to it during each of {TRIES} tries; run again when they have ended, what "
        "is uploaded is not sent again"
    )


def _with_card(merge: Merge, target: _Target, inputs: Inputs, options: MergeOptions, head: _Head) -> Merge:
    return with_card(merge, hub_card(head.card, target.name, inputs, merge, options))


def _read_head(target: _Target) -> _Head:
    """Return what the repository holds now: files and card of one commit."""
    commit = with_retry(lambda: target.api.model_info(target.name)).sha
    names = with_retry(lambda: list(target.api.list_repo_files(target.name, revision=commit)))
    if README not in names:
        return _Head(commit, names, "")
    path = with_retry(lambda: target.api.hf_hub_download(target.name, README, revision=commit))
    return _Head(commit, names, decode_card(Path(path).read_bytes(), target.name))


def _find_stale_files(head: _Head, plan: Plan) -> list[str]:
    """Find weights in the repository that the merge does not write: Transformers might load them instead."""
    made, is_merged = {file.name for file in plan.files}, has_pema_section(head.card)
    old = [name for name in head.files if "/" not in name and name.endswith(_STALE)]
    old += [name for name in head.files if is_merged and name.startswith(ADAPTERS + "/")]
    return [name for name in old if name not in made]


def _list_additions(merge: Merge, advance: Advance) -> Iterator[Any]:
    """List the files, from the folder where they were written to one; the card may be newer than the folder's."""
    from huggingface_hub import CommitOperationAdd

    for file in merge.plan.files:
        written = None if merge.target is None or file.name == README else merge.target / file.name
        yield CommitOperationAdd(
            file.name, open_stream(file, advance, merge.check_inputs) if written is None else written
        )


def _commit(target: _Target, merge: Merge, head: _Head, options: MergeOptions) -> "CommitInfo | None":
    """Commit all files on top of `head`; None where another commit came first."""
    from huggingface_hub import CommitOperationDelete

    with (
        ProgressBar("pushing", 2 * merge.plan.size, options.progress) as bar,
        _explain_errors(target.name),
        _one_bar(),
    ):
        deletions = [CommitOperationDelete(name, is_folder=False) for name in _find_stale_files(head, merge.plan)]
        operations = [*_list_additions(merge, bar.advance), *deletions]
        commit = partial(target.api.create_commit, commit_message=target.message, create_pr=target.create_pr)
        _upload(target, operations)
        merge.check_inputs()
        try:
            made = with_retry(lambda: commit(target.name, operations, parent_commit=head.commit))
        except Exception as error:  # whatever kind of error the client has for it
            if is_conflict(error):
                return None
            raise
    return made if made.oid == head.commit or _is_committed(operations) else None


def _is_committed(operations: list[Any]) -> bool:
    """Return whether there was anything to commit; else the client returns the newest commit, whatever its parent."""
    return any(getattr(operation, "_is_committed", True) for operation in operations)


def _upload(target: _Target, operations: list[Any]) -> None:
    """Upload the large files, which the commit then names."""
    from huggingface_hub import CommitOperationAdd

    files = [one for one in operations if isinstance(one, CommitOperationAdd)]
    with_retry(lambda: target.api.preupload_lfs_files(target.name, files, create_pr=target.create_pr))


def _note_commit(made: "CommitInfo") -> str:
    return f"pushed: {made.pr_url or made.commit_url}"


@contextmanager
def _one_bar() -> Iterator[None]:
    """Show our progress bar alone: the client's count files, not bytes, and appear where there is no terminal."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False:  # the user has spoken
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    """Turn an error of the client into one line; an error of the plan, which the client reads, passes through."""
    try:
        yield
    except PemaError:
        raise
    except Exception as error:  # whatever the client makes of an answer that it does not expect
        if ours := next((cause for cause in iterate_causes(error) if isinstance(cause, PemaError)), None):
            raise ours from None
        raise MergeError(f"{name}: cannot be pushed to {explain(error, 'push')}") from error
