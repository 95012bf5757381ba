"""Compare every exported model with the trained one.

    python tools/exports.py [--models bert,gpt2] [--methods lora,ia3] [--exports pema-merge,save_pretrained]
                            [--json FILE] [--save]

Rows are exports and kinds of model, columns are methods. A cell is "equal" (the exported and reloaded model computes
what the trained one does, for tokens in the vocabulary and outside), "refused" or "warned" (in one line, below the
table), "adapters" (wrong or impossible without PEMA, too) or "WRONG", of which one makes the exit status 1.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from compat.export_cell import EQUAL, EXPORTS, FULL, WRONG, BiasedBenches, Cell, Result, run
from compat.models import ALONE
from compat.progress import show_progress
from harness.command_line import make_parser, some_of
from harness.results import write_results
from harness.tables import format_table

MODELS = {
    "bert": ("classification", "masked"),
    "xlm-roberta": ("classification", "masked"),
    "gpt2": ("classification", "causal"),
    "t5": ("classification", "seq2seq"),
}
METHODS = (ALONE, "lora", "compacter", "ia3", "dora")


def cells(models: Sequence[str], methods: Sequence[str], exports: Sequence[str]) -> list[Cell]:
    """Return the cells to try; full fine-tuning has no method."""
    return [
        Cell(export, form, model, head, method)
        for model in models
        for head in MODELS[model]
        for export in exports
        for form in EXPORTS[export].forms
        for method in (methods if form != FULL else (ALONE,))
    ]


def markdown(results: Sequence[Result]) -> str:
    """Format a table for each model and head, the reasons as footnotes, and the count."""
    notes: dict[str, int] = {}
    tables = [_table(", ".join(subject), some, notes) for subject, some in _by_subject(results).items()]
    footnotes = "\n".join(f"[{number}] {reason}  " for reason, number in notes.items())
    count = {status: sum(each.status == status for each in results) for status in dict.fromkeys(_statuses(results))}
    total = ", ".join(f"{number} {status}" for status, number in count.items())
    return "\n\n".join(part for part in (*tables, footnotes, f"{len(results)} cells: {total}.") if part)


def _by_subject(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Group the results by model and head."""
    found: dict[tuple[str, str], list[Result]] = {}
    for each in results:
        found.setdefault((each.cell.model, each.cell.head), []).append(each)
    return found


def _statuses(results: Sequence[Result]) -> list[str]:
    return [EQUAL, WRONG, *(each.status for each in results)]


def _table(title: str, results: Sequence[Result], notes: dict[str, int]) -> str:
    methods = list(dict.fromkeys(each.cell.method for each in results))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for each in results:
        rows.setdefault((each.cell.export, each.cell.form), {})[each.cell.method] = _mark(each, notes)
    lines = [[*row, *(marks.get(method, "") for method in methods)] for row, marks in rows.items()]
    return format_table([title, "kind of model", *methods], lines)


def _mark(result: Result, notes: dict[str, int]) -> str:
    if result.status == EQUAL:
        return EQUAL
    return f"{result.status} [{notes.setdefault(result.reason, len(notes) + 1)}]"


def render(figures: dict[str, Any]) -> str:
    names = [field.name for field in fields(Cell)]
    saved = figures["cells"]
    return markdown([Result(Cell(*(one[n] for n in names)), one["status"], one["reason"]) for one in saved])


def main() -> int:
    options = _parser().parse_args()
    _quiet()
    benches, results = BiasedBenches(), []
    todo = cells(options.models, options.methods, options.exports)
    try:
        for cell in todo:
            results.append(run(cell, benches))
            show_progress(results[-1], len(results), len(todo), is_wrong=results[-1].status == WRONG)
    finally:
        benches.close()
    figures = {"cells": [vars(one.cell) | {"status": one.status, "reason": one.reason} for one in results]}
    print(render(figures))
    write_results(options, figures)
    return 1 if any(each.status == WRONG for each in results) else 0


def _quiet() -> None:
    """Use one thread, and silence libraries."""
    torch.set_num_threads(1)
    for name in ("transformers", "adapters"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("pema_adapters").propagate = False
    warnings.simplefilter("ignore")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    for name, known in (("models", tuple(MODELS)), ("methods", METHODS), ("exports", tuple(EXPORTS))):
        parser.add_argument(f"--{name}", type=some_of(known), default=known, metavar="A,B", help="all, if not given")
    return parser


if __name__ == "__main__":
    sys.exit(main())
