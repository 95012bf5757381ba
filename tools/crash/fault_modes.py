"""Modes of fault_merge.py: the files before a merge, the command, and the states that may follow it."""

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

from crash.digests import digest_file
from crash.fault_inputs import APPEAR, changes
from crash.fault_process import Fault, MergeServer

State = dict[str, str]
REPOSITORY = "someone/merged"


class Place:
    """A folder `kept` with the inputs as they were, and in it `root`, where a run works.

    hub: the server that is pushed to; None without one.
    """

    def __init__(self, kept: Path, server: MergeServer, hub: Any = None) -> None:
        self.kept, self.root, self.server, self.hub = kept, kept / "root", server, hub

    def reset(self, base: str) -> None:
        """Restore all files."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("work", "tmp", "home"):
            (self.root / name).mkdir(parents=True)
        self.restore_inputs(base)

    def restore_inputs(self, base: str) -> None:
        for name, source in (("base", base), ("delta", "delta")):
            shutil.rmtree(self.root / name, ignore_errors=True)
            shutil.copytree(self.kept / source, self.root / name)

    def state(self) -> State:
        """Return digests of all files below `root` but the Hub client's, and of the files on the Hub."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if not name.startswith("home/"):
                found[name] = _describe(path)
        if self.hub is not None and REPOSITORY in self.hub.repositories:
            files = self.hub.files(REPOSITORY).items()
            found |= {f"hub:{name}": hashlib.blake2b(data).hexdigest()[:16] for name, data in files}
        return found


def _describe(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    if path.is_dir():
        return "folder"
    return digest_file(path)


class Mode:
    """A way to merge.

    more: the command's options; base: which one; is_base_changed: whether the run changes the base itself.
    """

    name = "fresh"
    more: tuple[str, ...] = ()
    base = "base-shards"
    is_base_changed = False

    def prepare(self, place: Place) -> None:
        place.reset(self.base)

    def arguments(self, place: Place) -> list[str]:
        root = place.root
        found = ["--base", root / "base", "--delta", root / "delta", "--output", root / "work/out", *self.more]
        return [str(item) for item in found]

    def again(self, place: Place, is_complete: bool) -> list[str] | None:
        """Return the arguments of the run after a failed one; None where nothing is left to do."""
        more = ["--overwrite"] if is_complete and "--overwrite" not in self.more else []
        return [*self.arguments(place), *more]

    def steps_on_the_way(self, place: Place, before: State, after: State) -> list[State]:
        """Return the states at which a failing run may end, other than the one before it."""
        return []

    def changes(self, place: Place) -> dict[str, str]:
        """Return the changes that may happen during a run, `{name: shell command}`."""
        return changes(place.kept, place.root, self.base) | {"output-appears": APPEAR.format(root=place.root)}

    def last(self, place: Place) -> list[str] | None:
        """Return the arguments of a last command that restores the inputs."""
        return None


class Verify(Mode):
    name, more = "verify", ("--verify",)


class Pickle(Mode):
    """The base is a `.bin` file."""

    name, base = "bin", "base-bin"


class Narrow(Mode):
    """All numbers are cast."""

    name, more = "bfloat16", ("--dtype", "bfloat16")


class Overwrite(Mode):
    """An earlier merge is replaced."""

    name, more = "overwrite", ("--overwrite",)

    def prepare(self, place: Place) -> None:
        kept = place.kept / "earlier"
        if not kept.exists():
            place.reset(self.base)
            shutil.rmtree(place.root / "delta")
            shutil.copytree(place.kept / "revised/delta", place.root / "delta")
            arguments = [item for item in self.arguments(place) if item != "--overwrite"]
            assert place.server.run(arguments).code == 0
            (place.root / "work/out").rename(kept)
        place.reset(self.base)
        shutil.copytree(kept, place.root / "work/out")

    def changes(self, place: Place) -> dict[str, str]:
        out = place.root / "work/out"
        keep = {"notes-appear": f"mkdir -p {out}/checkpoint-9; echo mine > {out}/checkpoint-9/notes.txt"}
        return changes(place.kept, place.root, self.base) | keep


class InPlace(Mode):
    """The base's own files are changed; `--undo` gives them back."""

    name, more = "in-place", ("--in-place",)
    is_base_changed = True

    def arguments(self, place: Place) -> list[str]:
        found = ["--base", place.root / "base", "--delta", place.root / "delta", *self.more]
        return [str(item) for item in found]

    def again(self, place: Place, is_complete: bool) -> list[str] | None:
        return None if is_complete else self.arguments(place)

    def last(self, place: Place) -> list[str] | None:
        return ["--base", str(place.root / "base"), "--undo"]

    def changes(self, place: Place) -> dict[str, str]:
        return changes(place.kept, place.root, self.base)


class InPlaceVerify(InPlace):
    name, more = "in-place-verify", ("--in-place", "--verify")


class RollBack(InPlace):
    """A merge in place was killed while it changed the base; the next one rolls it back first."""

    name = "roll-back"

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        killed = place.server.run(self.arguments(place), self._moment(place))
        assert killed.code == -9, killed

    def steps_on_the_way(self, place: Place, before: State, after: State) -> list[State]:
        """Rolled back."""
        place.reset(self.base)
        return [place.state()]

    def _moment(self, place: Place) -> Fault:
        if not hasattr(self, "_found"):
            calls = place.server.run(self.arguments(place)).counts["any"]
            for at in range(calls, 0, -5):  # the last moment at which the base is between
                super().prepare(place)
                place.server.run(self.arguments(place), Fault("any", at, "SIGKILL"))
                journal = place.root / "base/.pema-undo/journal.json"
                if journal.exists() and '"patching"' in journal.read_text():
                    break
            self._found = Fault("any", max(1, at - 10), "SIGKILL")
            super().prepare(place)
        return self._found


class Undo(InPlace):
    """A merge in place is undone."""

    name = "undo"

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        assert place.server.run(super().arguments(place)).code == 0

    def arguments(self, place: Place) -> list[str]:
        return ["--base", str(place.root / "base"), "--undo"]

    def last(self, place: Place) -> list[str] | None:
        return None

    def changes(self, place: Place) -> dict[str, str]:
        return {name: text for name, text in super().changes(place).items() if name.endswith("base")}


class Push(Mode):
    """Onto the Hub, from the plan; the repository holds a card and older weights."""

    name = "push"

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        place.hub.repositories.pop(REPOSITORY, None)
        place.hub.publish(REPOSITORY, {"README.md": b"# By hand\n", "pytorch_model.bin": b"old"})

    def arguments(self, place: Place) -> list[str]:
        found = ["--base", place.root / "base", "--delta", place.root / "delta", "--push-to-hub", REPOSITORY]
        return [str(item) for item in (*found, *self.more)]

    def again(self, place: Place, is_complete: bool) -> list[str] | None:
        return self.arguments(place)

    def changes(self, place: Place) -> dict[str, str]:
        ask = {"card-edited": f"echo card > {place.kept}/ask; cat {place.kept}/answer > /dev/null"}
        return changes(place.kept, place.root, self.base) | ask


class PushCopy(Push):
    """With a copy on the disk."""

    name = "push-copy"

    def steps_on_the_way(self, place: Place, before: State, after: State) -> list[State]:
        """The copy is complete, the Hub as it was."""
        return [before | {name: text for name, text in after.items() if name.startswith("work")}]

    def arguments(self, place: Place) -> list[str]:
        return [*super().arguments(place), "--output", str(place.root / "work/out"), "--overwrite"]

    def changes(self, place: Place) -> dict[str, str]:
        """Without the card, which may be newer on the Hub than in the folder."""
        return changes(place.kept, place.root, self.base)


MODES = {
    mode.name: mode
    for mode in (
        Mode(), Verify(), Pickle(), Narrow(), Overwrite(), InPlace(), InPlaceVerify(), RollBack(), Undo(), Push(),
        PushCopy(),
    )
}  # fmt: skip


def run_change(command: str) -> None:
    """Run a change."""
    subprocess.run(["sh", "-c", command], check=True)
