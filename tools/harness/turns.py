"""Contestants in processes of their own that take turns, so that the load of the machine is the same for all.

`timing.time_paired` compares in one process, `child.run_in_child` measures the memory of one process. Here each
contestant is a fresh process that waits for its turn. Memory is watched in some turns and time taken in others, because
polling RssAnon slows down what is measured.

    def contestant(name) -> dict[str, Callable[[], Any]]: ...        # at the top level of the bench; runs in the child
    with Process(contestant, "full") as one, Process(contestant, "partial") as other:
        one.watch("step")           # bytes of RssAnon at the peak of one step
        times = take_turns({"full": one, "partial": other}, "step", rounds=5)
"""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from harness.child import POLL_SECONDS, anonymous_bytes
from harness.timing import rotate

SHORT = 100
"""Characters of an error that fit a table."""
START = "start"


class ContestantError(Exception):
    """A contestant's process failed; the message is one short line."""


class Process:
    """A fresh process that runs the commands of `work(*args)`.

    Attributes:
        floor: RssAnon in bytes after all imports and before anything else.

    Raises:
        ContestantError: `work` or a command failed.
    """

    def __init__(self, work: Callable[..., Mapping[str, Callable[[], Any]]], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child_main, args=(theirs, work, args), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.floor: int = self.ask(START)[1]
        except ContestantError:
            self.close()
            raise

    def ask(self, command: str) -> tuple[float, Any]:
        """Run a command. Returns its seconds and its result."""
        self._tell(command)
        return self._answer()

    def watch(self, command: str) -> int:
        """Run a command. Returns the highest RssAnon seen meanwhile, in bytes."""
        peak = anonymous_bytes(self._process.pid)
        self._tell(command)
        while not self._pipe.poll(POLL_SECONDS):
            peak = max(peak, anonymous_bytes(self._process.pid))
        self._answer()
        return max(peak, anonymous_bytes(self._process.pid))

    def _tell(self, command: str) -> None:
        with suppress(ConnectionError):  # the process ended: `_answer` says so
            self._pipe.send(command)

    def _answer(self) -> tuple[float, Any]:
        try:
            error, seconds, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ContestantError(f"its process ended with code {self._process.exitcode}") from None
        if error:
            raise ContestantError(error)
        return seconds, result

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def take_turns(contestants: Mapping[Any, Process], command: str, *, rounds: int) -> dict[Any, list[float]]:
    """Return the seconds of each contestant in each round; the first one changes every round."""
    times: dict[Any, list[float]] = {name: [] for name in contestants}
    for order in rotate(list(contestants), rounds):
        for name in order:
            times[name].append(contestants[name].ask(command)[0])
    return times


def _child_main(pipe: Connection, work: Callable[..., Mapping[str, Callable[[], Any]]], args: Any) -> None:
    floor = anonymous_bytes()

    def start() -> int:
        commands.update(work(*args))
        return floor

    commands: dict[str, Callable[[], Any]] = {START: start}
    with suppress(EOFError, ConnectionError):  # the other end closed the pipe
        while True:
            pipe.send(_run_command(commands[pipe.recv()]))


def _run_command(command: Callable[[], Any]) -> tuple[str | None, float, Any]:
    began = time.perf_counter()
    try:
        result = command()
    except Exception as error:
        return shorten(error), 0.0, None
    return None, time.perf_counter() - began, result


def shorten(error: Exception) -> str:
    """Return the type of an error and the beginning of its first line."""
    line = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    return line if len(line) <= SHORT else line[: SHORT - 3] + "..."
