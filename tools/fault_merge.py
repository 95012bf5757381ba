"""Merge while one system call fails, comes back short, or finds the files changed underneath.

    python tools/fault_merge.py [--faults 3000] [--seed 0] [--modes NAME ...] [--kinds NAME ...] [--jobs 2]
                                [--only MODE:KIND:N:ACTION ...] [--dir FOLDER] [--json FILE] [--save]

A preload library (`crash/faults_preload.c`, compiled at the start) counts the system calls of `pema-merge` that concern
its files, and disturbs the n-th of a kind: an error (`EIO`; with `+` for all later ones), half of the bytes (`short`),
a signal, or a change by somebody else (base or delta rewritten, replaced, cut short, removed; the output appears; the
card on the Hub is edited). The faults of all modes, kinds and calls are sampled down to `--faults`.

After every fault: exit code 0 with exactly the reference's bytes, or an error in one line and everything as it was;
base and delta untouched; "nothing was left behind" said only where it is true; and the same command, given again,
succeeds (`--undo` gives the base back byte for byte). Exits with 1 if anything was wrong, with 0 where there is no
compiler.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from crash.fault_inputs import write_inputs
from crash.fault_judge import Case, Expected, expect, expect_change, judge
from crash.fault_modes import MODES, REPOSITORY, Mode, Place
from crash.fault_process import KINDS, ROOT, Fault, MergeServer, Run, build
from harness.command_line import add_dir, make_parser
from harness.results import write_results
from harness.tables import format_table

sys.path.insert(0, str(ROOT))  # for tests.hub

ACTIONS: dict[str, tuple[str, ...]] = {
    "open": ("EIO", "EACCES", "EMFILE", "ENOENT", "ENOSPC", "ESTALE"),
    "read": ("EIO", "short", "EINTR"),
    "pread": ("EIO", "short", "EINTR"),
    "write": ("ENOSPC", "EIO", "short", "EDQUOT", "EINTR"),
    "pwrite": ("ENOSPC", "EIO", "short", "EDQUOT", "EINTR"),
    "fsync": ("EIO", "ENOSPC", "EINTR", "EIO+"),
    "close": ("EIO", "ENOSPC"),
    "rename": ("EIO", "EACCES", "ENOSPC", "ENOTEMPTY", "EIO+"),
    "unlink": ("EIO", "EACCES", "EBUSY", "EACCES+"),
    "mkdir": ("ENOSPC", "EACCES", "EEXIST"),
    "copy": ("EIO", "ENOSPC", "short", "EXDEV", "EXDEV+", "EINVAL", "EINTR"),
    "sendfile": ("EIO", "ENOSPC", "short", "EINVAL+"),
    "clone": ("EIO", "ENOSPC", "EINVAL", "EXDEV+"),
    "truncate": ("EIO", "ENOSPC"),
    "flock": ("EWOULDBLOCK", "ENOLCK", "EINTR"),
    "mmap": ("ENOMEM", "ENODEV"),
    "stat": ("EIO", "EACCES"),  # no system answers ENOENT for a file that exists
    "list": ("EIO", "EACCES"),
    "mode": ("EPERM", "EIO"),
    "advise": ("EINVAL",),
    "space": ("EIO", "ENOSYS"),
    "socket": ("ECONNRESET", "EPIPE"),
    "disk": ("ENOSPC+", "EDQUOT+", "EIO+"),
    "any": ("SIGINT", "SIGTERM", "SIGINT*2", "EIO+"),
}
"""Of `any`, the changes of the mode, too."""
Call: TypeAlias = tuple[str, int, str]
"""Kind, number, action."""
Chosen: TypeAlias = tuple[str, str, int, str]
"""The same, after the name of the mode."""


class Session:
    """The server and the inputs for the runs of one process. A context manager."""

    def __init__(self, library: Path, parent: Path | None, names: set[str]) -> None:
        with ExitStack() as stack:
            self.kept = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent))).resolve()
            root = self.kept / "root"
            variables = {"TMPDIR": str(root / "tmp"), "HF_HOME": str(root / "home"), "HF_TOKEN": "hf_good"}
            variables |= {"FAULTS_TORCH": "1"} if "bin" in names else {}
            hub = stack.enter_context(self._hub()) if names & {"push", "push-copy"} else None
            variables |= hub.variables(root / "home") if hub else {"HF_HUB_OFFLINE": "1"}
            write_inputs(self.kept)
            server = stack.enter_context(MergeServer(library, root, variables))
            self.place = Place(self.kept, server, hub)
            self._expected: dict[tuple[str, str], Expected] = {}
            self._stack = stack.pop_all()

    def _hub(self) -> Any:
        from tests.hub import Hub

        hub = Hub(self.kept / "hub")
        for name in ("ask", "answer"):
            os.mkfifo(self.kept / name)
        threading.Thread(target=self._edit_card, args=(hub,), daemon=True).start()
        return hub

    def _edit_card(self, hub: Any) -> None:
        """Edit the card on the Hub each time that a run's change asks for it, until the folder is removed."""
        with suppress(FileNotFoundError):
            while True:
                (self.kept / "ask").read_text()
                card = hub.store.blob(*hub.store.put(b"# By hand, and edited\n"), lfs=False)
                hub.repositories[REPOSITORY].commit("main", "edited", {"README.md": card})
                (self.kept / "answer").write_text("done")

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def expected(self, mode: Mode, action: str = "") -> Expected:
        """Return the states that may follow a run of the mode with the change `action`; "": undisturbed."""
        if (mode.name, action) not in self._expected:
            plain = expect(mode, self.place) if not action else self.expected(mode)
            command = mode.changes(self.place).get(action)
            self._expected[mode.name, action] = expect_change(mode, self.place, plain, command) if command else plain
        return self._expected[mode.name, action]

    def disturb(self, name: str, kind: str, at: int, action: str) -> dict[str, Any]:
        """Run one fault. Returns the outcome, and everything that is wrong."""
        mode = MODES[name]
        command = mode.changes(self.place).get(action, "")
        plain, expected = self.expected(mode), self.expected(mode, action if command else "")
        mode.prepare(self.place)
        fault = Fault(kind, at, action, command)
        run = self.place.server.run(mode.arguments(self.place), fault)
        wrong = judge(Case(mode, self.place, fault, run, expected, plain)) if run.hits else []
        where, said, *wrong = (text.replace(str(self.place.root), "ROOT") for text in (run.where, run.errors, *wrong))
        return {"fault": f"{name}:{kind}:{at}:{action}", "outcome": describe_outcome(run), "where": where,
                "said": said.strip(), "wrong": wrong}  # fmt: skip


def describe_outcome(run: Run) -> str:
    if not run.hits:
        return "not met"
    return "completed" if run.code == 0 else "refused" if run.code > 0 else "ended"


def all_faults(session: Session, names: list[str], kinds: list[str]) -> dict[str, list[Call]]:
    """Return every possible fault, `{mode: (kind, at, action)}`."""
    found = {}
    for name in names:
        mode, counts = MODES[name], session.expected(MODES[name]).counts
        found[name] = [
            (kind, at, action)
            for kind in kinds
            for action in (*ACTIONS[kind], *(mode.changes(session.place) if kind == "any" else ()))
            for at in range(1, counts[kind] + 1)
        ]
    return found


def sample(faults: dict[str, list[Call]], count: int, seed: int) -> list[Chosen]:
    """Choose `count` faults: the same share of each mode, and in it of each kind and action while it has some left."""
    chosen = []
    for number, (name, found) in enumerate(faults.items()):
        random = Random(f"{seed}:{name}")
        groups: dict[tuple[str, str], list[Call]] = defaultdict(list)
        for fault in random.sample(found, len(found)):
            groups[fault[0], fault[2]].append(fault)
        wanted = count // len(faults) + (number < count % len(faults))
        chosen += [(name, *fault) for fault in _take_in_turn(list(groups.values()), wanted)]
    return chosen


def _take_in_turn(groups: list[list[Call]], count: int) -> Iterator[Call]:
    while count > 0 and any(groups):
        for group in groups:
            if group and count > 0:
                count -= 1
                yield group.pop()


def disturb_all(place: tuple[Path, Path | None, set[str]], faults: list[Chosen], results: Any) -> None:
    """In a process of its own: run all faults, one after another. `place`: the arguments of `Session`."""
    with Session(*place) as session:
        for fault in faults:
            results.put(session.disturb(*fault))


def run_all(library: Path, options: argparse.Namespace, faults: list[Chosen]) -> list[dict[str, Any]]:
    """Spread the faults over the processes; print each wrong one as it is found."""
    results: Any = multiprocessing.Queue()
    place = (library, options.dir, {name for name, *_ in faults})
    shares = [faults[number :: options.jobs] for number in range(options.jobs)]
    workers = [multiprocessing.Process(target=disturb_all, args=(place, share, results)) for share in shares if share]
    for worker in workers:
        worker.start()
    found: list[dict[str, Any]] = []
    while len(found) < len(faults):
        if results.empty() and not any(worker.is_alive() for worker in workers):
            raise SystemExit("a process of this tool failed")
        if results.empty():
            time.sleep(0.05)
            continue
        found.append(results.get())
        if len(found) % 100 == 0:
            print(f"{len(found)} of {len(faults)} faults", file=sys.stderr, flush=True)
        for line in found[-1]["wrong"]:
            print(f"WRONG --only {found[-1]['fault']} ({found[-1]['where']}): {line}", flush=True)
    return found


def render(figures: dict[str, Any]) -> str:
    """Count the outcomes by mode."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for one in figures["faults"]:
        counts[one["fault"].split(":")[0]].update([one["outcome"], *(["WRONG"] if one["wrong"] else [])])
    columns = ("refused", "completed", "ended", "not met", "WRONG")
    rows = [[name, *(value[column] for column in columns)] for name, value in sorted(counts.items())]
    wrong = sum(value["WRONG"] for value in counts.values())
    total = f"{len(figures['faults'])} faults (seed {figures['seed']}) in {figures['seconds']:.0f} s, {wrong} wrong"
    return f"{format_table(['mode', *columns], rows)}\n\n{total}"


def main() -> int:
    options = _parser().parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        if library is None:
            print("no C compiler for Linux here: nothing to do")
            return 0
        found = run_all(library, options, choose(library, options))
    if options.only:
        print(*(f"{one['fault']}: {one['outcome']}, at {one['where']}: {one['said']}" for one in found), sep="\n")
    figures = {"seed": options.seed, "seconds": time.perf_counter() - start, "faults": found}
    print(render(figures))
    write_results(options, figures)
    return 1 if any(one["wrong"] for one in found) else 0


def choose(library: Path, options: argparse.Namespace) -> list[Chosen]:
    """Return the faults of `--only`, or a sample of all."""
    if options.only:
        return [(name, kind, int(at), action) for name, kind, at, action in (one.split(":") for one in options.only)]
    with Session(library, options.dir, set(options.modes)) as session:
        return sample(all_faults(session, options.modes, options.kinds), options.faults, options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--faults", type=int, default=3000, help="over all modes (default 3000)")
    add("--seed", type=int, default=0)
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of calls; default: all")
    add("--jobs", type=int, default=2, help="processes (default 2)")
    add("--only", nargs="+", metavar="MODE:KIND:N:ACTION", help="just these faults")
    add_dir(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
