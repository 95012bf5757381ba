"""Kill merges: at random moments, and right before every single step that changes the disk.

    python tools/kill_merge.py [--kills 200] [--seed 0] [--size-mb 64] [--modes NAME ...] [--dir FOLDER]
                               [--json FILE] [--save]

`pema-merge` runs as a process of its own on a generated base and is ended with SIGKILL: half of `--kills` anywhere in
its time, half after it began to write. Then it is killed once before each of its steps (open, write, fsync, rename,
remove). After every kill the target must be absent or complete, base and delta untouched, and the same command, given
again, must end with the reference's bytes and leave nothing else behind. Last, the disk becomes full on the way.

Modes: `fresh` (no output yet), `verify`, `overwrite` (of an earlier merge), `in-place` (where the command has it; then
`--undo` must give the base back byte for byte). Exits with 1 if anything was wrong. SIGKILL ends the process, not the
machine: what the disk holds after a power cut is another matter.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from crash.full_disk import full_disks
from crash.kill_modes import MODES, Mode, Place, Reference, contents, inputs, run
from fuzz.pairs import put
from harness.checkpoints import MERGE
from harness.command_line import add_dir, make_parser
from harness.results import write_results
from harness.tables import format_table

CHILD = [sys.executable, str(Path(__file__).resolve().parent / "crash" / "kill_child.py")]


@dataclass
class Tally:
    """Of one mode: the number of kills, the states found after them, and everything wrong."""

    kills: int = 0
    finished: int = 0
    states: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def make_reference(mode: Mode, place: Place) -> Reference:
    """Run the mode three times undisturbed."""
    times = []
    for _ in range(3):
        mode.prepare(place)
        start = time.perf_counter()
        process = subprocess.Popen([*MERGE, *mode.arguments(place)])
        begun = start
        while process.poll() is None:
            if begun == start and mode.has_begun(place):
                begun = time.perf_counter()
            time.sleep(0.001)
        if process.returncode:
            raise SystemExit(f"{mode.name}: the undisturbed merge failed")
        end = time.perf_counter()
        times.append((end - start, end - begun))
    whole, writing = (sorted(part)[1] for part in zip(*times, strict=True))
    return Reference(mode.result(place), contents(place.target), whole, writing)


def check(mode: Mode, place: Place, reference: Reference, tally: Tally, moment: str) -> None:
    """After a kill: check the state, run again, check again."""
    state = mode.state(place, reference.target)
    tally.states[state] += 1
    wrong = [f"changed: {', '.join(touched)}"] if (touched := place.find_changed()) else []
    wrong += ["the target is neither absent nor complete"] if state == "WRONG" else []
    wrong += _after_rerun(mode, place, reference, mode.again(place, state))
    wrong += [f"changed by the next run: {', '.join(touched)}"] if (touched := place.find_changed()) else []
    for line in wrong:
        print(f"WRONG {mode.name}, killed {moment}, state {state!r}: {line}", flush=True)
        tally.wrong.append(f"{moment}: {line}")


def _after_rerun(mode: Mode, place: Place, reference: Reference, command: list[str] | None) -> list[str]:
    """Run the command again. Returns everything that is wrong then."""
    again = run(command) if command is not None else None
    if again is not None and again.returncode:
        return [f"the next run failed: {again.stderr.strip()}"]
    found, wanted = mode.result(place), reference.result
    if found != wanted:
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        return [f"the next run's output differs from the reference: {', '.join(names)}"]
    return [last] if (last := mode.afterwards(place)) else []


def kill_at(mode: Mode, place: Place, reference: Reference, random: Random, is_aimed: bool) -> str | None:
    """Kill one run at a random moment. Returns the moment, None where the run was over before."""
    mode.prepare(place)
    process = subprocess.Popen([*MERGE, *mode.arguments(place)], stderr=subprocess.DEVNULL)
    delay = random.uniform(0, (reference.writing if is_aimed else reference.seconds) * 1.05)
    while is_aimed and process.poll() is None and not mode.has_begun(place):
        time.sleep(0.0002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    is_over = process.poll() is not None
    process.kill()
    process.wait()
    return None if is_over else f"{delay * 1000:.0f} ms {'after it began to write' if is_aimed else 'after its start'}"


def kill_at_random(mode: Mode, place: Place, reference: Reference, count: int, seed: int) -> Tally:
    random, tally = Random(f"{seed}:{mode.name}"), Tally()
    for number in range(count):
        moment = kill_at(mode, place, reference, random, is_aimed=bool(number % 2))
        tally.kills += moment is not None
        tally.finished += moment is None
        check(mode, place, reference, tally, moment or "at its end")
    return tally


def kill_at_every_step(mode: Mode, place: Place, reference: Reference) -> Tally:
    """Kill one run right before each step that changes the disk."""
    tally, counts = Tally(), place.root / "steps"
    steps, last = 0, 0
    while last <= steps:
        mode.prepare(place)
        arguments = [str(last), str(place.work), str(counts), *mode.arguments(place)]
        done = subprocess.run([*CHILD, *arguments], capture_output=True, text=True, check=False)
        if last == 0:
            steps = int(counts.read_text())
        elif done.returncode == -signal.SIGKILL:
            tally.kills += 1
            check(mode, place, reference, tally, f"before step {last} of {steps}")
        else:
            tally.finished += 1
        last += 1
    return tally


def has_in_place() -> bool:
    return "--in-place" in run(["--help"]).stdout


def main() -> int:
    options = _parser().parse_args()
    names = options.modes or [name for name in MODES if name != "in-place" or has_in_place()]
    tallies: dict[str, Tally] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        put(Path(folder), inputs(options.size_mb))
        place = Place(Path(folder).resolve())
        references = {name: make_reference(MODES[name], place) for name in names}
        for name, reference in references.items():
            count = -(-options.kills // len(names))
            tallies[f"{name}, at random"] = kill_at_random(MODES[name], place, reference, count, options.seed)
            tallies[f"{name}, at every step"] = kill_at_every_step(MODES[name], place, reference)
        disks = full_disks(place, make_reference(MODES["fresh"], place), options.size_mb)
    figures = {
        "seed": options.seed,
        "seconds": time.perf_counter() - start,
        "kills": {name: vars(tally) for name, tally in tallies.items()},
        "disks": disks,
        "undisturbed_seconds": {name: [one.seconds, one.writing] for name, one in references.items()},
    }
    print(render(figures))
    write_results(options, figures)
    full = [text for text in disks.values() if text and "not run" not in text]
    return 1 if full or any(tally.wrong for tally in tallies.values()) else 0


def render(figures: dict[str, Any]) -> str:
    header = ["mode", "kills", "over before", "found after the kill", "wrong"]
    rows = []
    for name, tally in figures["kills"].items():
        states = ", ".join(f"{state}: {count}" for state, count in sorted(tally["states"].items()))
        rows.append([name, tally["kills"], tally["finished"], states, len(tally["wrong"])])
    disks = [[name, text or "-"] for name, text in figures["disks"].items()]
    kills = sum(tally["kills"] for tally in figures["kills"].values())
    total = f"{kills} kills (seed {figures['seed']}) in {figures['seconds']:.0f} s"
    return "\n\n".join([format_table(header, rows), format_table(["full disk", "wrong"], disks), total])


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=200, help="at random moments, over all modes (default 200)")
    add("--seed", type=int, default=0)
    add("--size-mb", type=int, default=64, help="of the base (default 64)")
    add("--modes", nargs="+", choices=MODES, help="default: all that the command has")
    add_dir(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
