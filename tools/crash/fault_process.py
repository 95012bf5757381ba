"""`pema-merge` with one system call disturbed: builds the preload library, and runs commands under it.

A server process has the library loaded and the modules imported, and forks for every command: that is ten times faster
than to start Python anew. The child behaves as a process of its own: its own descriptors, signals, output, exit code.
"""

import contextlib
import ctypes
import errno
import importlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("faults_preload.c")
KINDS = (
    "open", "read", "pread", "write", "pwrite", "fsync", "close", "rename", "unlink", "mkdir", "copy", "sendfile",
    "clone", "truncate", "flock", "mmap", "stat", "list", "mode", "advise", "space", "socket", "disk", "any",
)  # fmt: skip
"""In the order of the library. disk: every call that takes space; any: every call."""
FAIL, SHORT, SIGNAL, COMMAND = 1, 2, 3, 4
TIMEOUT = 60
SOON = 7
"""So many calls later the second signal comes."""


class Settings(ctypes.Structure):
    """The library's `struct settings`."""

    _fields_ = (
        ("counts", ctypes.c_long * len(KINDS)), ("at", ctypes.c_long), ("hits", ctypes.c_long),
        ("again", ctypes.c_long),
        ("kind", ctypes.c_int), ("action", ctypes.c_int), ("value", ctypes.c_int), ("sticky", ctypes.c_int),
        ("root", ctypes.c_char * 1024), ("command", ctypes.c_char * 4096), ("where", ctypes.c_char * 1024),
    )  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens at call number `at` of a kind.

    action: the name of an errno, with "+" if all later calls fail too; "short"; a signal ("SIGINT", and "SIGINT*2" for
    a second one soon after); or the name of a change, whose shell command is `command`.
    """

    kind: str
    at: int
    action: str
    command: str = ""

    def settings(self) -> dict[str, Any]:
        """Return the fields of `Settings`."""
        name = self.action.removesuffix("+").removesuffix("*2")
        if self.command:
            action, value = COMMAND, 0
        elif name == "short":
            action, value = SHORT, 0
        elif name.startswith("SIG"):
            action, value = SIGNAL, int(getattr(signal, name))
        else:
            action, value = FAIL, int(getattr(errno, name))
        sticky, again = int(self.action.endswith("+")), self.at + SOON if self.action.endswith("*2") else 0
        return {"kind": KINDS.index(self.kind), "at": self.at, "again": again, "action": action, "value": value,
                "sticky": sticky, "command": self.command}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A command that ended: exit code (negative: the signal), what it printed, the calls of each kind.

    hits: how often it was disturbed; where: the last disturbed call, and the path it concerned.
    """

    code: int
    output: str
    errors: str
    hits: int
    where: str
    counts: dict[str, int] = field(repr=False)
    is_stuck: bool = False


def build(folder: Path) -> Path | None:
    """Compile the library into `folder`. Returns its path, None where that cannot be done here."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform != "linux":
        return None
    made = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", made, SOURCE, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    return made


class MergeServer:
    """Runs `pema-merge`; calls below `root` are counted and disturbed. For `with`."""

    def __init__(self, library: Path, root: Path, variables: Mapping[str, str]) -> None:
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        settings = {"LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(root)], env={**os.environ, **settings}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip

    def run(self, arguments: list[str], fault: Fault | None = None) -> Run:
        """Run the command to its end."""
        request = {"arguments": arguments, "settings": fault.settings() if fault else {}}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Run(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> "MergeServer":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate("")


def serve(root: Path) -> int:
    """Serve a command for each line of stdin. Returns the exit code, in a forked child that of the command."""
    library = ctypes.CDLL(None)
    settings = ctypes.POINTER(Settings).in_dll(library, "faults").contents
    settings.root = os.fsencode(root)
    commands, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    kept = root.parent
    import_all()
    for line in commands:
        request = json.loads(line)
        configure(settings, request["settings"])
        child = os.fork()
        if child == 0:
            commands.close()
            answers.close()
            return run_child(library, request["arguments"], kept)
        answers.write(json.dumps(asdict(await_child(child, settings, kept))) + "\n")
        answers.flush()
    return 0


def import_all() -> None:
    """Import everything the command may import: `huggingface_hub` with a Hub, torch with FAULTS_TORCH."""
    from pema_adapters import cli, formats, hub, io, merging

    for package in (cli, formats, hub, io, merging):
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if not module.name.startswith("pema_adapters.cli.") or module.name.endswith((".merge", "_run")):
                importlib.import_module(module.name)
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # as pema-merge does before it imports the client
    if "HF_ENDPOINT" in os.environ:
        importlib.import_module("huggingface_hub.hf_api")
        importlib.import_module("huggingface_hub.lfs")
    if "FAULTS_TORCH" in os.environ:  # what a `.bin` base takes
        importlib.import_module("torch")


def configure(settings: Settings, wanted: dict[str, Any]) -> None:
    settings.counts[:] = [0] * len(KINDS)
    for name in ("at", "again", "hits", "kind", "action", "value", "sticky"):
        setattr(settings, name, wanted.get(name, 0))
    settings.command, settings.where = os.fsencode(wanted.get("command", "")), b""


def run_child(library: ctypes.CDLL, arguments: list[str], kept: Path) -> int:
    """In the child: run `pema-merge` with output and errors in files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(kept / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    opened = os.open(os.devnull, os.O_RDONLY)
    os.dup2(opened, 0)
    os.close(opened)
    from pema_adapters.cli.merge import main

    ctypes.c_int.in_dll(library, "faults_armed").value = 1
    code = main(arguments)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def await_child(child: int, settings: Settings, kept: Path) -> Run:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(TIMEOUT)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    is_stuck = signal.alarm(0) == 0
    output, errors = ((kept / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    counts = dict(zip(KINDS, settings.counts, strict=True))
    return Run(code, output, errors, settings.hits, settings.where.decode(errors="replace"), counts, is_stuck)


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1])))
