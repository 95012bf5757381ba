"""Judge a disturbed run: the files that it left, and its message."""

import re
from dataclasses import dataclass, field

from crash.digests import MARKER
from crash.fault_modes import Mode, Place, State, run_change
from crash.fault_process import Fault, Run

UNCHANGED = re.compile(r"nothing (?:was|is) (?:left|kept|touched|changed|written|replaced)")
RESTORED = re.compile(r"is as it was|is restored(?! (?:in part|completely))")
NOT_UNDONE = re.compile(r"nothing was undone")
NOT_PUSHED = re.compile(r"nothing was pushed")
COMPLETE = re.compile(r"is complete\b|is merged completely")
INTACT = re.compile(r"(?<!no )journal is intact")
JOURNALED = re.compile(r"\.pema-undo|undo journal is intact")
CODES = {"SIGINT": (0, 1, 130, -2), "SIGINT*2": (0, 1, 130, -2), "SIGTERM": (0, 1, 143, -15)}
REMOVING = ("unlink", "list", "stat", "rename", "open", "close")
"""Calls that the removal of a folder needs: where one of them fails, something may stay."""


@dataclass
class Expected:
    """Of a mode: the calls that it makes, and the states before and after it.

    With a change that happens meanwhile: all states that it could give by happening earlier or later.
    """

    before: list[State]
    after: list[State]
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A disturbed run. plain: the states that are right without a change."""

    mode: Mode
    place: Place
    fault: Fault
    run: Run
    expected: Expected
    plain: Expected


def expect(mode: Mode, place: Place) -> Expected:
    """Run the mode undisturbed. Raises `SystemExit` where that fails."""
    mode.prepare(place)
    before = place.state()
    run = place.server.run(mode.arguments(place))
    if run.code:
        raise SystemExit(f"{mode.name}: the undisturbed run failed: {run.errors}")
    after = place.state()
    return Expected([before, *mode.steps_on_the_way(place, before, after)], [after], run.counts)


def expect_change(mode: Mode, place: Place, plain: Expected, command: str) -> Expected:
    """Return the states that are right where the change happens at some moment of the run."""
    mode.prepare(place)
    run_change(command)
    before, after = [place.state()], []
    if mode.is_base_changed and plain.before[1:]:  # rolled back, and changed
        place.restore_inputs(mode.base)
        run_change(command)
        before.append(place.state())
        if place.server.run(mode.arguments(place)).code == 0:  # rolled back, and then what is there now was merged
            after.append(place.state())
        mode.prepare(place)
        run_change(command)
    if place.server.run(mode.arguments(place)).code == 0:  # the change came first
        after.append(place.state())
    mode.prepare(place)
    place.server.run(mode.arguments(place))
    run_change(command)
    return Expected([*plain.before, *before], [*after, place.state()])


def judge(case: Case) -> list[str]:
    """Return everything wrong with a run, and with the runs after it."""
    state = case.place.state()
    return [*_judge_words(case), *_judge_state(case, state), *_judge_next_runs(case, state)]


def _judge_words(case: Case) -> list[str]:
    run, wrong = case.run, []
    if run.is_stuck:
        wrong.append("hangs")
    elif run.code not in CODES.get(case.fault.action, (0, 1)):
        wrong.append(f"exit code {run.code}")
    if "Traceback" in run.errors or "Exception ignored" in run.errors:
        wrong.append(f"traceback: {run.errors.strip().splitlines()[-1]}")
    elif run.errors.count("\n") > 1 and (run.code or "push" not in case.mode.name):  # the Hub's client tells of retries
        wrong.append(f"{run.errors.count(chr(10))} lines: {run.errors.strip()!r}")
    if run.code == 1 and not run.errors:
        wrong.append("fails without a word")
    if (folder := _failed_input(case)) and folder not in run.errors:
        wrong.append(f"names another place than {folder}: {run.errors.strip()}")
    return wrong


def _failed_input(case: Case) -> str:
    """Return the input, base or delta, whose file a call failed on, if the run failed with it."""
    is_error = case.fault.action.startswith("E") and not case.fault.action.endswith("+")
    folders = (f"{case.place.root}/{name}" for name in ("base", "delta"))
    found = next((folder for folder in folders if f" {folder}/" in case.run.where), "")
    return found if is_error and case.run.code == 1 else ""


def _judge_state(case: Case, state: State) -> list[str]:
    run, expected = case.run, case.expected
    if run.code == 0:
        kept, state = state, _without_named(state, run.output)
        accepted = [*expected.after, *(case.plain.after if _keeps_notes(kept) else [])]
        return [] if state in accepted else [f"succeeds, but {_difference(state, expected.after)}"]
    if (claim := _false_claim(case, state)) is not None:
        return [claim] if claim else []
    if state in (*expected.before, *expected.after) or _is_excused(case, state):
        return []
    return [f"leaves without saying so: {_difference(state, expected.before)}"]


def _without_named(state: State, said: str) -> State:
    """Return the state without a replaced output that could not be removed, where a note names it."""
    aside = "work/.out.pema-replaced"
    return {name: text for name, text in state.items() if not (name.startswith(aside) and f"/{aside}" in said)}


def _keeps_notes(state: State) -> bool:
    """Whether a file of somebody else is kept in the output that was replaced."""
    return any(name.startswith("work/.out.pema-replaced/") and name.endswith("/notes.txt") for name in state)


def _false_claim(case: Case, state: State) -> str | None:
    """Return a false claim of the run about what it left; "" for a true one, None without a claim."""
    said, expected = case.run.errors, case.expected
    what = "the result is complete" if state in expected.after else _difference(state, expected.before)
    if claim := COMPLETE.search(said):
        is_true, what = _results(state) in map(_results, expected.after), _difference(state, expected.after)
    elif claim := RESTORED.search(said):
        is_true = _is_restored(case, state)
    elif claim := UNCHANGED.search(said):
        is_true = state in expected.before
    elif claim := INTACT.search(said):
        is_true, what = "base/.pema-undo" in state, "there is none"
    elif claim := NOT_UNDONE.search(said):
        is_true = _without_journal(state) in map(_without_journal, expected.before)
    elif (claim := NOT_PUSHED.search(said)) and _hub(state) not in map(_hub, expected.before):
        is_true = False
    else:
        return None
    return "" if is_true else f"says {claim[0]!r}, but {what}"


def _is_restored(case: Case, state: State) -> bool:
    """Whether the base is what it was before the merge in place; leftovers of the journal must be named."""
    wanted = case.expected.after if case.mode.name == "undo" else case.expected.before
    if _has_journal(state) and not JOURNALED.search(case.run.errors):
        return False
    return _without_journal(state) in map(_without_journal, wanted)


def _has_journal(state: State) -> bool:
    return any(name.startswith("base/.pema-undo") for name in state)


def _without_journal(state: State) -> State:
    return {name: text for name, text in state.items() if not name.startswith("base/.pema-undo")}


def _is_excused(case: Case, state: State) -> bool:
    """Whether the run named what it left, or could not help it."""
    fault, run = case.fault, case.run
    if fault.action == "replace-base" and run.where.startswith("rename ") and "/.pema-undo/new/" in run.where:
        return True  # within our own rename of a checked file: no portable call compares and renames at once
    steps = (*case.plain.before, *case.plain.after)
    if fault.command and not case.mode.is_base_changed and _results(state) in map(_results, steps):
        return True  # the inputs alone differ, which this tool itself changed after the step was complete
    left = state.keys() - case.expected.before[0].keys()
    is_journaled = "base/.pema-undo" in state
    if any(name.split("/")[-1] in run.errors for name in left) or (is_journaled and JOURNALED.search(run.errors)):
        return True
    if run.code == -15:
        return is_journaled
    missing = set.intersection(
        *(known.keys() - state.keys() for known in (*case.expected.before, *case.expected.after))
    )
    is_lost = any(
        name.startswith(("base", "delta", "work/out")) and not name.startswith("base/.pema-undo") for name in missing
    )
    if is_lost and not is_journaled and not fault.command:
        return False
    return fault.action.endswith(("+", "*2")) or (fault.kind in REMOVING and fault.action.startswith("E"))


def _difference(state: State, accepted: list[State]) -> str:
    """Name what differs from the nearest accepted state."""
    best = min((_differing(state, other) for other in accepted), key=len)
    shown = ", ".join(best[:6])
    return f"differs in {shown}{f' and {len(best) - 6} more' if len(best) > 6 else ''}"


def _differing(state: State, other: State) -> list[str]:
    """Return the names that differ; "+": only in `state`, "-": only in `other`."""
    found = []
    for name in sorted(state.keys() | other.keys()):
        if state.get(name) != other.get(name):
            sign = "+" if name not in other else "-" if name not in state else ""
            found.append(sign + name)
    return found


def _judge_next_runs(case: Case, state: State) -> list[str]:
    """Run the command again, undisturbed, and then the one that restores the inputs."""
    mode, place, plain = case.mode, case.place, case.plain
    if case.fault.command:
        if mode.is_base_changed or case.fault.action.endswith(("-appears", "-appear", "-edited")):
            return []  # no telling what would be right
        place.restore_inputs(mode.base)
    if mode.name.startswith("in-place") and case.run.errors.rstrip().endswith("run --undo"):  # do what it says
        run = place.server.run(mode.last(place) or [])
        if run.code:
            return [f"--undo fails: {run.errors.strip()}"]
        state = place.state()
    again = mode.again(place, state in plain.after or f"work/out/{MARKER}" in state or case.run.code == 0)
    if again is not None:
        run = place.server.run(again)
        is_known = RESTORED.search(case.run.errors) or "cannot be read any more" in case.run.errors
        if "nothing to undo" in run.errors and is_known:
            return []
        if run.code:
            return [f"the next run fails: {run.errors.strip()}"]
        found = place.state()
        wanted, found = (
            (plain.after, found) if not case.fault.command else ([*map(_outputs, plain.after)], _outputs(found))
        )
        if found not in wanted:
            return [f"the next run {_difference(found, wanted)}"]
    return _judge_last(mode, place)


def _judge_last(mode: Mode, place: Place) -> list[str]:
    last = mode.last(place)
    if last is None:
        return []
    run = place.server.run(last)
    if run.code:
        return [f"--undo fails: {run.errors.strip()}"]
    found = _inputs(place.state())
    place.restore_inputs(mode.base)
    wanted = _inputs(place.state())
    return [] if found == wanted else [f"--undo {_difference(found, [wanted])}"]


def _inputs(state: State) -> State:
    return {name: text for name, text in state.items() if name.startswith(("base", "delta"))}


def _results(state: State) -> State:
    """Return the files that "complete" refers to: the output folder, or the base changed in place."""
    folder = "work" if any(name.startswith("work/") for name in state) else "base"
    return {name: text for name, text in state.items() if name.startswith(folder)}


def _hub(state: State) -> State:
    return {name: text for name, text in state.items() if name.startswith("hub:")}


def _outputs(state: State) -> State:
    return {name: text for name, text in state.items() if name.startswith(("work", "hub:"))}
