"""Work in a fresh process, and the anonymous memory that it takes (RssAnon: memory that no file backs).

peak = run_in_child(child, 50_265).grown      # def child(v): data = make(v); yield; return scan(data)
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Child:
    """Of the measured part: seconds, result, and RssAnon (bytes) before it and at its peak."""

    seconds: float
    before: int
    peak: int
    result: Any

    @property
    def grown(self) -> int:
        return self.peak - self.before


def run_in_child(work: Callable[..., Generator[None, None, Any]], *args: Any) -> Child:
    """Run a generator function (at the top level of a tool, with one bare `yield`) in a fresh process.

    Before the `yield` is set-up; what follows is timed while this process polls the child's RssAnon.

    Args:
        work: returns anything that pickles.
        args: its arguments.

    Raises:
        RuntimeError: `work` failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child_main, args=(theirs, work, args))
    process.start()
    theirs.close()
    try:
        ours.recv()
        before = peak = anonymous_bytes(process.pid)
        ours.send("go")
        while not ours.poll(POLL_SECONDS):
            peak = max(peak, anonymous_bytes(process.pid))
        seconds, last, result = ours.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__} failed in its process; its traceback is above") from None
    finally:
        process.join()
    return Child(seconds, before, max(peak, last), result)


def _child_main(pipe: Connection, work: Callable[..., Generator[None, None, Any]], args: Any) -> None:
    generator, result = work(*args), None
    next(generator)
    pipe.send("ready")
    pipe.recv()
    start = time.perf_counter()
    try:
        next(generator)
    except StopIteration as stop:
        result = stop.value
    pipe.send((time.perf_counter() - start, anonymous_bytes(), result))


def anonymous_bytes(pid: int | str | None = "self") -> int:
    """Return RssAnon of a process in bytes; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def end_with_parent() -> None:
    """Have this process of multiprocessing end when its parent does, also where the parent is killed."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
