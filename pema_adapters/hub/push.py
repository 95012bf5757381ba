"""A merged checkpoint onto the Hub: one commit, uploaded straight from the plan, or from the folder just written."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema_adapters.errors import MergeError, PemaError
from pema_adapters.hub.card import README, is_ours
from pema_adapters.hub.merged_card import merged_card
from pema_adapters.hub.stream import opened
from pema_adapters.merging.merge import Inputs, Merge, Options, finished, measured, open_inputs, prepare, write_merge
from pema_adapters.merging.others import ADAPTERS
from pema_adapters.merging.patience import causes, patiently
from pema_adapters.merging.plan import Plan, PlannedFile
from pema_adapters.merging.planning import Choices
from pema_adapters.merging.progress import Advance, bar
from pema_adapters.merging.report import MergeReport
from pema_adapters.merging.segments import Literal

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

MESSAGE = "Upload a checkpoint merged with pema_adapters"
_STALE = (".safetensors", ".bin", ".index.json")


@dataclass(frozen=True)
class _Target:
    """Where to push; `name` is the repository's."""

    name: str
    private: bool | None
    create_pr: bool
    message: str
    api: "HfApi"


def push_merged_to_hub(  # noqa: PLR0913 - merge_checkpoint's arguments, and those of push_to_hub
    base: str | Path,
    delta: str | Path,
    repo_id: str,
    output: str | Path | None = None,
    *,
    adapter: str | None = None,
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
    other files are deleted by the same commit.

    Args:
        base, delta, output, adapter, revision, dtype, fold, overwrite, verify, allow_base_mismatch, progress: as for
            `merge_checkpoint`; `output` and what goes with it only where a copy on the disk is wanted as well.
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
    choices = Choices(dtype, fold, allow_base_mismatch)
    options = Options(choices, adapter, revision, overwrite, dry_run, verify, progress, token)
    try:
        return _push(
            str(base), str(delta), output, _target(repo_id, private, create_pr, commit_message, token), options
        )
    except OSError as error:
        raise MergeError(f"{error.filename or repo_id}: {error.strerror or error}; nothing was pushed") from error


def _target(
    repo_id: str, private: bool | None, create_pr: bool, message: str | None, token: str | bool | None
) -> _Target:
    from huggingface_hub import HfApi

    return _Target(repo_id, private, create_pr, message or MESSAGE, HfApi(token=token))


def _push(base: str, delta: str, output: str | Path | None, target: _Target, options: Options) -> MergeReport:
    start = time.perf_counter()
    with open_inputs(base, delta, options, is_output_needed=False) as inputs:
        merge = prepare(inputs, None if output is None else Path(output), options)
        return measured(merge, start) if options.dry_run else _send(merge, inputs, target, options, start)


def _send(merge: Merge, inputs: Inputs, target: _Target, options: Options, start: float) -> MergeReport:
    with _as_one_line(target.name):
        url = patiently(lambda: target.api.create_repo(target.name, private=target.private, exist_ok=True))
        target = replace(target, name=url.repo_id)
        there = _files_there(target)
        old_card = _old_card(target, there)
    merge = _with_card(merge, target, inputs, options, old_card)
    report = merge.report
    if merge.target is not None:
        report = write_merge(merge, options, start)
    stale = _stale(there, merge.plan, is_ours(old_card))
    with bar("pushing", 2 * merge.plan.size, options.progress) as advance, _as_one_line(target.name), _one_bar():
        made = _commit(target, _additions(merge, advance), stale, merge)
    report = finished(report, merge.plan, start)
    return replace(report, output=report.output or str(url), notes=(*report.notes, _about(made)))


def _with_card(merge: Merge, target: _Target, inputs: Inputs, options: Options, old_card: str) -> Merge:
    text = merged_card(old_card, target.name, inputs, merge, options)
    card = PlannedFile(README, (Literal(text.encode()),))
    files = (*(file for file in merge.plan.files if file.name != README), card)
    return replace(merge, plan=replace(merge.plan, files=files))


def _files_there(target: _Target) -> list[str]:
    return list(target.api.list_repo_files(target.name))


def _old_card(target: _Target, there: list[str]) -> str:
    if README not in there:
        return ""
    return Path(target.api.hf_hub_download(target.name, README)).read_text()


def _stale(there: list[str], plan: Plan, is_merged: bool) -> list[str]:
    """Weights in the repository that the merge does not write: Transformers might load them instead of the new ones."""
    made = {file.name for file in plan.files}
    old = [name for name in there if "/" not in name and name.endswith(_STALE)]
    old += [name for name in there if is_merged and name.startswith(ADAPTERS + "/")]
    return [name for name in old if name not in made]


def _additions(merge: Merge, advance: Advance) -> Iterator[Any]:
    from huggingface_hub import CommitOperationAdd

    for file in merge.plan.files:
        written = None if merge.target is None else merge.target / file.name
        yield CommitOperationAdd(file.name, opened(file, advance) if written is None else written)


def _commit(target: _Target, additions: Iterator[Any], stale: list[str], merge: Merge) -> "CommitInfo":
    from huggingface_hub import CommitOperationDelete

    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    _upload(target, operations)
    merge.check_inputs()
    commit = partial(target.api.create_commit, commit_message=target.message, create_pr=target.create_pr)
    return patiently(lambda: commit(target.name, operations))


def _upload(target: _Target, operations: list[Any]) -> None:
    """Upload the large files, which the commit then names."""
    from huggingface_hub import CommitOperationAdd

    files = [one for one in operations if isinstance(one, CommitOperationAdd)]
    patiently(lambda: target.api.preupload_lfs_files(target.name, files, create_pr=target.create_pr))


def _about(made: "CommitInfo") -> str:
    return f"pushed: {made.pr_url or made.commit_url}"


@contextmanager
def _one_bar() -> Iterator[None]:
    """Ours: the client's count files, not bytes, and appear where there is no terminal."""
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
def _as_one_line(name: str) -> Iterator[None]:
    """What the client raises becomes one line; what the plan raises while the client reads it comes through."""
    from huggingface_hub import errors

    try:
        yield
    except PemaError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # the client's own errors are among them
        chain = list(causes(error))
        if ours := next((cause for cause in chain if isinstance(cause, PemaError)), None):
            raise ours from None
        answer = next((cause for cause in chain if isinstance(cause, errors.HfHubHTTPError)), chain[-1])
        raise MergeError(f"{name}: cannot be pushed to ({_reason(answer)}") from error


def _reason(error: BaseException) -> str:
    """The reason, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split())[:300]
    table = {
        401: "no token, or one that the Hub does not know); log in (hf auth login), or give --token",
        403: f"{text}); give a token that may write there (hf auth login, --token), or free some quota",
        404: "no such repository, or no token that may see it); check the name, or log in (hf auth login, --token)",
        413: f"{text}); it is too large for the Hub",
        429: f"{text}); too many requests: run again later, what is uploaded is not sent again",
    }
    again = f"{text or type(error).__name__}); check the network and run again, what is uploaded is not sent again"
    return table.get(status, again) if isinstance(status, int) else again
