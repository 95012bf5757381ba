"""Try PEMA beside every method of adapters, on every model type of it.

    python tools/compatibility.py [--models bert,t5] [--methods lora,compacter] [--heads classification,masked]
                                  [--auto] [--json FILE] [--save]

Every cell is a tiny random model that trains, saves, loads and merges (see compat/cell.py). A cell that fails is tried
without PEMA, too: "adapters" means that adapters cannot do it by itself. `--auto` tries AutoAdapterModel instead:
flexible heads, what becomes of the output, and the lines that `pema-merge` prints (see compat/auto_cell.py).
"""

import argparse
import contextlib
import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from compat.auto_cell import HEADS as AUTO_HEADS
from compat.auto_cell import METHODS as AUTO_METHODS
from compat.auto_cell import MODELS as AUTO_MODELS
from compat.auto_cell import AutoBenches, AutoCell, auto_cells, run_auto
from compat.cell import OURS, Benches, Cell, Result, run
from compat.matrix import auto_markdown, markdown
from compat.models import ALONE, FAMILIES, LM_HEADS, METHODS, WITHOUT_TEXT
from compat.progress import show_progress
from harness.command_line import make_parser, some_of
from harness.results import write_results

PROCESSES, SECONDS_A_CELL = 2, 180
HEAD_KINDS = ("classification", *LM_HEADS)


def cells(models: Sequence[str], methods: Sequence[str], heads: Sequence[str]) -> list[list[Cell]]:
    """Return the cells to try, in groups that share a checkpoint."""
    groups = [[Cell(model, ALONE, heads[0])] for model in models if model in WITHOUT_TEXT]
    for model in (each for each in models if each in FAMILIES):
        kinds = [head for head in heads if head in FAMILIES[model].head_kinds()]
        groups += [[Cell(model, method, head) for method in methods] for head in kinds]
    return groups


def run_all(groups: Sequence[Sequence[Cell]], processes: int = PROCESSES) -> Iterator[Result]:
    """Yield results as they come. A process that dies or hangs is one failed cell; another takes its place."""
    todo: queue.SimpleQueue[Sequence[Cell]] = queue.SimpleQueue()
    done: queue.SimpleQueue[Result | None] = queue.SimpleQueue()
    for group in groups:
        todo.put(group)
    threads = [threading.Thread(target=_feed, args=(todo, done), daemon=True) for _ in range(processes)]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        result = done.get()
        if result is None:
            running -= 1
        else:
            yield result


def _feed(todo: "queue.SimpleQueue[Sequence[Cell]]", done: "queue.SimpleQueue[Result | None]") -> None:
    worker = Worker()
    try:
        while True:
            for cell in todo.get_nowait():
                result = worker.run(cell)
                if result is None:
                    worker.stop()
                    worker, result = Worker(), Result(cell, OURS, "the process died, or took too long")
                done.put(result)
    except queue.Empty:
        worker.stop()
    finally:
        done.put(None)


class Worker:
    """A process that runs one cell after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, cell: Cell) -> Result | None:
        """Return the result; None where the process died or did not answer in time."""
        try:
            self._pipe.send(cell)
            return self._pipe.recv() if self._pipe.poll(SECONDS_A_CELL) else None
        except (EOFError, OSError):
            return None

    def stop(self) -> None:
        """Let the process clean up, then end it."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(5)
        self._process.kill()
        self._process.join()


def _work(pipe: Connection) -> None:
    """In the process: answer cells with results, until None comes."""
    _quiet()
    benches = Benches()
    auto_benches = AutoBenches(benches.folder)
    try:
        while (cell := pipe.recv()) is not None:
            pipe.send(run_auto(cell, auto_benches) if isinstance(cell, AutoCell) else run(cell, benches))
    finally:
        benches.close()


def _quiet() -> None:
    """Use one thread, and silence everything."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process


def render(figures: dict[str, Any]) -> str:
    return markdown([_read_result(Cell, saved) for saved in figures["cells"]])


def render_auto(figures: dict[str, Any]) -> str:
    return auto_markdown([_read_result(AutoCell, saved) for saved in figures["cells"]])


def main() -> int:
    options = _parser().parse_args()
    groups = _auto_groups(options) if options.auto else _groups(options)
    total, results = sum(map(len, groups)), []
    with contextlib.suppress(KeyboardInterrupt):  # the results so far are shown
        for result in run_all(groups, options.processes):
            results.append(result)
            show_progress(result, len(results), total, is_wrong=result.status == OURS)
    figures = {"cells": [_save_result(each) for each in results]}
    print(render_auto(figures) if options.auto else render(figures))
    write_results(options, figures, "compatibility-auto" if options.auto else None)
    return 1 if any(each.status == OURS for each in results) else 0


def _groups(options: argparse.Namespace) -> list[list[Cell]]:
    return cells(options.models or (*FAMILIES, *WITHOUT_TEXT), options.methods or METHODS, options.heads or HEAD_KINDS)


def _auto_groups(options: argparse.Namespace) -> list[list[AutoCell]]:
    return auto_cells(
        options.models or AUTO_MODELS, options.methods or AUTO_METHODS, options.heads or tuple(AUTO_HEADS)
    )


def _save_result(result: Result) -> dict[str, Any]:
    return vars(result.cell) | {name: value for name, value in vars(result).items() if name != "cell"}


def _read_result(kind: type[Cell], saved: dict[str, Any]) -> Result:
    names = {field.name for field in fields(kind)}
    cell = kind(**{name: value for name, value in saved.items() if name in names})
    return Result(cell, **{name: value for name, value in saved.items() if name not in names})


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    for name, known in (
        ("models", (*FAMILIES, *WITHOUT_TEXT)),
        ("methods", METHODS),
        ("heads", (*HEAD_KINDS, *AUTO_HEADS)),
    ):
        parser.add_argument(f"--{name}", type=some_of(known), metavar="A,B", help="all, if not given")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--auto", action="store_true", help="flexible heads of AutoAdapterModel")
    return parser


if __name__ == "__main__":
    sys.exit(main())
