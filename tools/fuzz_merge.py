"""Merge thousands of mutated bases and deltas: each is refused in one line without a trace, or merged provably right.

    python tools/fuzz_merge.py [--mutations 10000] [--seed 0] [--time SECONDS] [--family NAME] [--only NUMBER ...]
                               [--keep FOLDER] [--json FILE] [--save]

Small valid pairs of base and delta, one file of which is mutated: cut, flipped, lied about, replaced by a pipe or a
hostile pickle. The same seed gives the same mutations. Merges run in a process of their own, under a limit of time and
memory. Exits with 1 if a case escaped: another exception than the package's own, a hang, memory, leftovers, inputs that
changed, code from a pickle that ran, a wrong output, a message that is not one readable line about the right file.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.tally import KINDS, format_counts
from fuzz.worker import UNTOUCHED, Outcome, work
from harness.command_line import add_dir, make_parser
from harness.results import write_results

KEEP = Path(tempfile.gettempdir(), "pema-fuzz-escapes")


class Worker:
    """A process that merges; restarted after a case that killed it."""

    def __init__(self, folder: Path, seed: int, family: str | None, limit: float) -> None:
        self.folder, self.arguments, self.limit = folder, (folder, seed, family), limit
        self.untouched: list[tuple[str, Outcome]] = []
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *self.arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.untouched.clear()
        while (said := self.pipe.recv())[0] == UNTOUCHED:
            self.untouched.append(said[1:])
        self.mutations = said[1]

    def judge(self, number: int) -> tuple[str, str, Outcome]:
        """Return the family of case `number`, its name and its outcome."""
        family = name = "?"
        try:
            self.pipe.send(number)
            _, family, name = self.pipe.recv()
            if self.pipe.poll(self.limit):
                return family, name, self.pipe.recv()[2]
            outcome = Outcome("escaped", f"hangs: no answer after {self.limit} s", fatal=True)
        except EOFError:
            self.process.join()
            outcome = Outcome("escaped", f"the process died with exit code {self.process.exitcode}", fatal=True)
        return family, name, outcome

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def restart(self) -> None:
        self.stop()
        self.start()


@dataclass
class Tally:
    """Counts, remarks and escapes so far."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    escapes: list[dict[str, Any]] = field(default_factory=list)

    def add(self, family: str, name: str, number: int | None, outcome: Outcome) -> None:
        self.counts.setdefault(family, Counter())[outcome.kind] += 1
        if outcome.remark:
            self.remarks[outcome.remark] += 1
        if outcome.kind == "escaped":
            self.escapes.append({"number": number, "name": name, "what": outcome.text})
            print(f"ESCAPE {name}\n    {outcome.text.strip()}", flush=True)


def keep(folder: Path, source: Path, number: int, name: str, text: str) -> None:
    """Save the inputs of an escape; pipes are left out."""
    target = folder / f"case-{number}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for side in ("base", "delta"):
        shutil.copytree(source / "case" / side, target / side, symlinks=True,
                        ignore=lambda where, names: [n for n in names if Path(where, n).is_fifo()])  # fmt: skip
    (target / "case.json").write_text(json.dumps({"number": number, "name": name, "what": text}, indent=2))


def run(options: argparse.Namespace, folder: Path) -> tuple[Tally, float, int]:
    """Judge the cases. Returns the tally, the seconds, and the number of mutations to choose from."""
    worker, tally = Worker(folder, options.seed, options.family, options.limit), Tally()
    for name, outcome in worker.untouched:
        tally.add(UNTOUCHED, name, None, outcome)
    start = time.perf_counter()
    numbers: Iterable[int] = options.only or range(options.mutations)
    for number in numbers:
        if options.time and time.perf_counter() - start > options.time:
            break
        family, name, outcome = worker.judge(number)
        tally.add(family, name, number, outcome)
        if options.only:
            print(f"{name}\n    {outcome.kind}: {outcome.text}")
        if outcome.kind == "escaped":
            keep(options.keep, folder, number, name, outcome.text)
        if outcome.fatal:
            worker.restart()
    worker.stop()
    return tally, time.perf_counter() - start, worker.mutations


def render(figures: dict[str, Any]) -> str:
    counts = figures["counts"]
    count = sum(sum(found.values()) for found in counts.values())
    seconds, escapes = figures["seconds"], figures["escapes"]
    total = f"{count:,} cases (seed {figures['seed']}) in {seconds:.0f} s, {len(escapes)} escaped"
    remarks = [f"note: {remark}: {number} cases" for remark, number in figures["remarks"].items()]
    return "\n\n".join([format_counts(counts, KINDS), total, *remarks])


def main() -> int:
    options = _parser().parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=options.dir or (memory if memory.is_dir() else None)) as name:
        tally, seconds, mutations = run(options, Path(name).resolve())
    figures = {"seed": options.seed, "mutations": mutations, "seconds": seconds} | vars(tally)
    print(render(figures))
    write_results(options, figures)
    return 1 if tally.escapes else 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--mutations", type=int, default=10_000, help="how many cases (default 10,000)")
    add("--seed", type=int, default=0)
    add("--time", type=float, metavar="SECONDS", help="stop after so long")
    add("--family", help="only mutations of this family (as in the table)")
    add("--only", type=int, nargs="+", metavar="NUMBER", help="only these cases, with their outcome in full")
    add("--limit", type=float, default=20, metavar="SECONDS", help="for one case, after which it hangs (default 20)")
    add("--keep", type=Path, default=KEEP, metavar="FOLDER", help="where inputs of escapes are saved")
    add_dir(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
