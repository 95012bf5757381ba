"""The `checkpoint-STEP` folders of a Trainer: choose one, and suggest how to choose one."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pema_adapters.errors import FormatError
from pema_adapters.formats.json_object import read_json

LATEST, BEST = "latest", "best"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d{1,18})")


def is_checkpoint_choice(text: str) -> bool:
    """Return whether `--checkpoint` accepts the text: "latest", "best", or the number of a step."""
    return text in (LATEST, BEST) or _NAME.fullmatch(f"checkpoint-{text}") is not None


def pick_checkpoint(run: Path, choice: str | int) -> Path:
    """Return the folder of one checkpoint of a training run.

    Args:
        run: The Trainer's output folder.
        choice: "latest" for the highest step, "best" for the one that trainer_state.json names, or a step.

    Raises:
        FormatError: There is no such checkpoint, or `choice` is none of these.
    """
    choice = str(choice)
    if not is_checkpoint_choice(choice):
        raise FormatError(f"checkpoint {choice!r}: expected {LATEST}, {BEST}, or the number of a step")
    if not run.is_dir():
        raise FormatError(f"{run}: no such folder; expected a Trainer's output folder with checkpoint-STEP folders")
    found = _list_checkpoints(run)
    if not found:
        raise FormatError(f"{run}: no checkpoint-STEP folder here; --checkpoint needs a Trainer's output folder")
    if choice == LATEST:
        return found[max(found)]
    step = _read_best_step(found[max(found)] / TRAINER_STATE) if choice == BEST else int(choice)
    if step not in found:
        named = f" ({TRAINER_STATE} of {found[max(found)].name} names it as the best)" if choice == BEST else ""
        raise FormatError(f"{run}: no checkpoint-{step} here{named}; found the steps {_format_steps(found)}")
    return found[step]


def suggest_choice(folder: Path, found: Sequence[Path], adapter: str | None) -> str:
    """Return the advice for a command that found several deltas in `folder`, with the newest checkpoint as example."""
    steps = {step: path for path in found if (step := _parse_step(folder, path)) is not None}
    if len(steps) < 2 and adapter is None:
        return "pick one with --adapter NAME, or give its folder"
    if len(steps) < 2:
        path = shlex.quote(found[-1].relative_to(folder).as_posix())
        return f"pick one by its path, as in --adapter {path}, or give its folder"
    newest = steps[max(steps)]
    inside = [path for path in found if _parse_step(folder, path) == max(steps)]
    if adapter is None and len(inside) > 1:
        adapter = newest.name
    words = ["--delta", str(folder), "--checkpoint", LATEST, *(["--adapter", adapter] if adapter is not None else [])]
    return f"pick one with --checkpoint {LATEST}|{BEST}|STEP; the newest is: pema-merge {shlex.join(words)}"


def _list_checkpoints(run: Path) -> dict[int, Path]:
    return {int(match[1]): path for path in run.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()}


def _parse_step(folder: Path, delta: Path) -> int | None:
    """Return the step of the checkpoint of `folder` that `delta` is or lies in, None if it is in none."""
    match = _NAME.fullmatch(delta.relative_to(folder).parts[0]) if delta != folder else None
    return int(match[1]) if match else None


def _read_best_step(state: Path) -> int:
    """Read the step of the best checkpoint, whose folder may have been moved along with the run."""
    if not state.is_file():
        raise FormatError(f"{state}: no such file, which names the best checkpoint; choose a step with --checkpoint")
    named = read_json(state).get("best_model_checkpoint")
    name = PurePosixPath(named.replace("\\", "/")).name if isinstance(named, str) else ""
    match = _NAME.fullmatch(name)
    if match is None:
        raise FormatError(
            f"{state}: names no best checkpoint (found {str(named)[:80]!r}); train with metric_for_best_model, or "
            f"choose a step with --checkpoint"
        )
    return int(match[1])


def _format_steps(found: dict[int, Path]) -> str:
    return ", ".join(map(str, sorted(found)))
