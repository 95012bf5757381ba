"""Modes and inputs of kill_merge.py: a base with two deltas, and the ways to merge them."""

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from crash.digests import digest_file
from fuzz.pairs import CONFIG, E, Files, T, adapter, base, dump, fingerprint, noise, of
from harness.checkpoints import MERGE

WIDTH, SHARDS, LAYERS, BLOCKS = 256, 3, 8, 6
Contents = dict[str, str]


def run(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run `pema-merge` with these arguments."""
    return subprocess.run([*MERGE, *arguments], capture_output=True, text=True, check=False)


def arguments(base: Path, delta: Path, output: Path) -> list[str]:
    return ["--base", str(base), "--delta", str(delta), "--output", str(output), "--quiet"]


def tensors(megabytes: int) -> dict[str, T]:
    """Return the tensors of the base, half embedding, half layers."""
    rows = megabytes * 500_000 // (4 * WIDTH)
    layers = {
        f"bert.encoder.layer.{i}.output.dense.weight": of(noise(rows // LAYERS, WIDTH, seed=i)) for i in range(LAYERS)
    }
    return {f"bert.{E}": of(noise(rows, WIDTH))} | layers


def inputs(megabytes: int) -> Files:
    """Return a base in shards, and two deltas of it."""
    found = tensors(megabytes)
    rows = found[f"bert.{E}"].shape[0]
    files = base(found, shards=SHARDS)
    files["base/config.json"] = dump(CONFIG | {"vocab_size": rows, "hidden_size": WIDTH})
    for number, name in enumerate(("delta", "earlier")):
        ids = tuple(i for i in range(rows) if i * 12 * BLOCKS // rows % 12 == number)  # so many writes, one a block
        own = {"fingerprint": fingerprint(found, ids, rows), "token_ids": of(ids, "I32"),
               "weight": of(noise(len(ids), WIDTH, seed=20 + number))}  # fmt: skip
        files |= {path.replace("delta/", f"{name}/"): node for path, node in adapter(own).items()}
    return files


def contents(folder: Path) -> Contents:
    """`{path: digest}` of all files, hidden ones too; of the report, all but paths and seconds."""
    return {
        path.relative_to(folder).as_posix(): digest_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


@dataclass
class Place:
    """A folder with base and deltas, and their digests; modes write their output to `work`."""

    root: Path
    before: dict[str, Contents] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = {name: contents(self.root / name) for name in ("base", "delta", "earlier")}

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def target(self) -> Path:
        return self.work / "out"

    def fresh(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def find_changed(self) -> list[str]:
        """Return the names of inputs that changed."""
        return [name for name, held in self.before.items() if contents(self.root / name) != held]


@dataclass
class Reference:
    """An undisturbed run of a mode: all files afterwards, those of the target, and the seconds of its parts."""

    result: Contents
    target: Contents
    seconds: float
    writing: float


class Mode:
    """A way to merge: the files before it, the command, and the states that may follow a kill."""

    name = "fresh"
    more: tuple[str, ...] = ()

    def prepare(self, place: Place) -> None:
        place.fresh()

    def arguments(self, place: Place, *more: str) -> list[str]:
        return [*arguments(place.root / "base", place.root / "delta", place.target), *self.more, *more]

    def has_begun(self, place: Place) -> bool:
        """Whether something was written."""
        return any(place.work.glob(".out.pema-*"))

    def state(self, place: Place, reference: Contents) -> str:
        """Name the state of the target after a kill; "WRONG" where it is none that may be."""
        if not place.target.exists():
            return "absent"
        return "new" if contents(place.target) == reference else "WRONG"

    def result(self, place: Place) -> Contents:
        """Return all files after a successful run: the output, and nothing beside it."""
        return contents(place.work)

    def again(self, place: Place, state: str) -> list[str] | None:
        """Return the arguments of the run after the kill; None where nothing is left to do."""
        return self.arguments(place, *(["--overwrite"] if state == "new" and "--overwrite" not in self.more else []))

    def afterwards(self, place: Place) -> str:
        """Check the result after the rerun. Returns what is wrong."""
        return ""


class Verify(Mode):
    name = "verify"
    more = ("--verify",)


class Overwrite(Mode):
    """The earlier merge must be there until the new one is, at the target or under a hidden name that a rerun knows."""

    name = "overwrite"
    more = ("--overwrite",)
    old: Contents | None = None

    def prepare(self, place: Place) -> None:
        place.fresh()
        kept = place.root / "earlier-output"
        if not kept.exists():
            run(arguments(place.root / "base", place.root / "earlier", kept)).check_returncode()
        shutil.copytree(kept, place.target)
        self.old = self.old or contents(place.target)

    def has_begun(self, place: Place) -> bool:
        return (place.work / ".out.pema-partial").exists()

    def state(self, place: Place, reference: Contents) -> str:
        found = contents(place.target) if place.target.exists() else {}
        if found in (self.old, reference):
            return "old" if found == self.old else "new"
        aside = place.work / ".out.pema-replaced"
        is_aside = not found and aside.exists() and contents(aside) == self.old
        return "absent, old one hidden" if is_aside else "WRONG"


class InPlace(Mode):
    """A copy of the base becomes the merged checkpoint; `--undo` restores it."""

    name = "in-place"
    more = ("--in-place",)

    def prepare(self, place: Place) -> None:
        place.fresh()
        shutil.copytree(place.root / "base", place.target)

    def arguments(self, place: Place, *more: str) -> list[str]:
        found = ["--base", place.target, "--delta", place.root / "delta", "--quiet"]
        return [str(item) for item in (*found, *self.more, *more)]

    def has_begun(self, place: Place) -> bool:
        held = {path.name for path in place.work.rglob("*") if path.is_file()}
        return held != {Path(name).name for name in place.before["base"]}

    def state(self, place: Place, reference: Contents) -> str:
        found = contents(place.target)
        return "base" if found == place.before["base"] else "new" if found == reference else "between"

    def again(self, place: Place, state: str) -> list[str] | None:
        return None if state == "new" else self.arguments(place)

    def afterwards(self, place: Place) -> str:
        undo = run(["--base", str(place.target), "--undo"])
        if undo.returncode:
            return f"--undo failed: {undo.stderr.strip()}"
        return "" if contents(place.target) == place.before["base"] else "--undo did not give the base back"


MODES = {mode.name: mode for mode in (Mode(), Verify(), Overwrite(), InPlace())}
