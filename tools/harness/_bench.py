"""What the benches share: paired runs, ratios, a child's anonymous memory, a table, `--json`.

Seconds depend on the machine, ratios travel: contestants take turns within one run, and a ratio is the median
over the rounds of contestant / reference in the same round.

    times = paired({"bitmap": bitmap, "scan": scan}, rounds=7)
    median_ratio(times, "scan", "bitmap")
    peak = in_child(child, 50_265).grown      # def child(v): data = make(v); yield; return scan(data)
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.0005


def paired(contestants: Mapping[str, Callable[[], Any]], *, rounds: int = 5) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one uncounted round; the order turns every round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            contestants[name]()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Median over the rounds of name / reference, both from the same round."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


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


def in_child(work: Callable[..., Generator[None, None, Any]], *args: Any) -> Child:
    """Run a generator function (at the top level of the bench, with one bare `yield`) in a fresh process.

    Before the `yield` is set-up; what follows is timed while this process polls the child's RssAnon. What it
    returns (anything that pickles) is the result.
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
    """RssAnon of a process in bytes: memory that no file backs. 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [[str(cell) for cell in row] for row in (header, ["---"] * len(header), *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)


def parser(description: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """A parser with the options that every bench has: `--rounds N` and `--json FILE`."""
    style = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser(description=description, formatter_class=style)
    options.add_argument("--rounds", type=int, default=rounds, help=f"counted rounds (default {rounds})")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    return options


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Write the figures, if a path was asked for."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
