"""`pema-merge` that kills itself at a given step: `python tools/crash/kill_child.py STEP FOLDER COUNTS ARGUMENT ...`.

A step is anything that changes the disk below FOLDER (a file opened for writing, a write, a copy by the kernel, fsync,
rename, removal, a folder made); the process dies right before step number STEP. With STEP 0 it lives, and writes the
number of its steps to the file COUNTS.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
CALLS = (
    "pwrite",
    "write",
    "pwritev",
    "fsync",
    "fdatasync",
    "copy_file_range",
    "sendfile",
    "ftruncate",
    "posix_fallocate",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Steps:
    """Counts steps, and ends the process right before the one asked for."""

    def __init__(self, last: int, folder: str) -> None:
        self.last, self.folder, self.count = last, folder, 0

    def take(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count a step for an audit event; an audit hook."""
        is_writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if (is_writing or event in EVENTS) and self._is_inside(arguments[0]):
            self.take()

    def _is_inside(self, name: Any) -> bool:
        return isinstance(name, str | bytes | os.PathLike) and os.fsdecode(name).startswith(self.folder)

    def count_calls(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with a step before each call."""

        def call(*arguments: Any, **named: Any) -> Any:
            self.take()
            return function(*arguments, **named)

        return call


def main() -> int:
    last, folder, counts, *arguments = sys.argv[1:]
    from pema_adapters.cli.merge import main as merge

    steps = Steps(int(last), folder)
    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, steps.count_calls(getattr(os, name)))
    sys.addaudithook(steps.hear)
    code = merge(arguments)
    if not steps.last:
        Path(counts).write_text(str(steps.count))
    return code


if __name__ == "__main__":
    sys.exit(main())
