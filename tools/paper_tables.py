"""Reproduce the PEMA paper's Tables 2, 3, 5 and 6 (and 4, with XNLI), beside the paper's figures.

    python tools/paper_tables.py --tokenizers DIR --glue DIR [--xnli DIR] [--tables 2 3 5 6]
                                 [--json FILE] [--save]

    DIR of --tokenizers: a folder for each, bert-base-uncased, roberta-base, deberta-v3-base,
        bert-base-multilingual-cased, xlm-roberta-base, xlm-v-base: whichever there are
    DIR of --glue: a folder for each task, CoLA, MNLI, ..., in it train, validation and test as .tsv or .tsv.gz
        with a header: one or two columns of text, label; no quoting
    DIR of --xnli: the same, a folder for each language, ar, bg, ...

The ids are those of train, validation and test together, cut at 128, pairs encoded as pairs, special tokens and the pad
token counted; V is the rows of the embedding; N is the model's with a head for classification. What a missing tokenizer
or task leaves open is a dash. Nothing is downloaded, trained or stored.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers.utils import logging as transformers_logging

from harness.command_line import make_parser
from harness.results import write_results
from harness.tables import format_table
from paper.data import Usage
from paper.figures import EMBEDDING, MEAN, MILLIONS, MODEL, SUBSETS, TABLE_7, TABLES
from paper.models import Size, model_of
from pema_adapters import PartialVocabulary
from pema_adapters.errors import PemaError

CLOSE = 0.1 + 1e-9
"""Points, or millions, within which a cell counts as reproduced; the paper rounds to one digit."""
DASH = "-"
GLUE, XNLI = "GLUE", "XNLI"
NO_CAUSE = "no cause known"
CAUSES = {
    "xlm-roberta-base": "a tokenizer rebuilt from rounded scores splits a few texts in ten thousand differently; "
    "with the published one this is open"
}
"""Of tokenizers."""
NOTES = {
    2: "BERT and DistilBERT are the uncased ones here (V = 30,522), as the paper's figures are, although its Table 5 "
    "lists the cased ones (28,996).",
    5: "BERT and DistilBERT are the cased ones here (V = 28,996), see Table 2. V is given, the rest is computed.",
    6: "l, h and d are given, the rest is computed.",
}


@dataclass(frozen=True)
class Cell:
    """A figure of the paper, and the computed one (None: the data are not there)."""

    table: int
    section: str
    row: str
    column: str
    paper: float
    ours: float | None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours - self.paper

    @property
    def close(self) -> bool:
        return self.difference is not None and abs(self.difference) <= CLOSE

    @property
    def equal(self) -> bool:
        """The same digits as in the paper."""
        return self.ours is not None and f"{self.ours:.1f}" == f"{self.paper:.1f}"

    def __str__(self) -> str:
        if self.ours is None:
            return f"{self.paper:.1f} {DASH}"
        difference = round(self.difference, 2) + 0.0  # no -0.00
        return f"{self.paper:.1f} {self.ours:.2f} {difference:+.2f}{'' if self.close else ' !'}"


def count_removed(size: Size, vocabulary: PartialVocabulary) -> int:
    """Count the parameters that need not be in memory."""
    return (vocabulary.vocab_size - len(vocabulary)) * size.width


REDUCTIONS: dict[str, Callable[[Size, PartialVocabulary], float]] = {
    EMBEDDING: lambda _, vocabulary: 100 * vocabulary.reduction,
    MODEL: lambda size, vocabulary: 100 * count_removed(size, vocabulary) / size.total,
    MILLIONS: lambda size, vocabulary: count_removed(size, vocabulary) / 1e6,
}
"""The sections of Tables 2, 3 and 4."""
SHARES: dict[str, Callable[[Size], float]] = {
    "N_emb": lambda size: size.embedding / 1e6,
    "N": lambda size: size.total / 1e6,
    "N_emb/N": lambda size: 100 * size.embedding / size.total,
}
"""The columns of Tables 5 and 6."""


def cells(number: int, usage: Usage) -> Iterator[Cell]:
    """Yield all cells of a table, also those that cannot be computed."""
    for section, rows in TABLES[number].sections.items():
        for row, paper in rows.items():
            columns = TABLES[number].columns
            ours = [compute(number, section, row, column, usage) for column in columns if column != MEAN]
            if MEAN in columns:
                ours.append(None if None in ours else fmean(ours))
            for column, figure, found in zip(columns, paper, ours, strict=True):
                yield Cell(number, section, row, column, figure, found)


def compute(number: int, section: str, row: str, column: str, usage: Usage) -> float | None:
    model = model_of(number, row)
    if column in SHARES:
        return SHARES[column](model.size)
    vocabulary = usage.of(model.tokenizer, model.rows, *data_of(number, column))
    return None if vocabulary is None else REDUCTIONS[section](model.size, vocabulary)


def data_of(number: int, column: str) -> tuple[str, tuple[str, ...]]:
    """Return benchmark and tasks of a column."""
    return (XNLI, SUBSETS[column]) if number == 4 else (GLUE, (column,))


def markdown(number: int, found: Iterable[Cell]) -> str:
    """Format a table of the paper, one section below the other."""
    shown, parts = TABLES[number], [f"## Table {number}: {TABLES[number].title}"]
    lines: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for cell in found:
        lines[cell.section][cell.row].append(str(cell))
    for section, rows in lines.items():
        header = ["Model", *shown.given, *shown.columns]
        body = [[row, *(f"{value:,}" for value in (shown.settings or {}).get(row, ())), *rows[row]] for row in rows]
        parts += [f"{section}; in a cell: paper, computed, difference", format_table(header, body)]
    return "\n\n".join([*parts, *([NOTES[number]] if number in NOTES else [])])


def causes(found: Iterable[Cell], usage: Usage) -> str:
    """Explain the cells that are further off: a line a cause."""
    off: dict[str, list[str]] = defaultdict(list)
    for cell in found:
        if cell.ours is not None and not cell.close:
            off[cause(cell, usage)].append(f"{cell.row} {cell.column}")
    return "\n".join(f"! {', '.join(dict.fromkeys(which))}: {why}" for why, which in off.items())


def cause(cell: Cell, usage: Usage) -> str:
    if cell.column == MEAN:
        return "the mean of the cells beside it"
    rows = usage.rows.get((GLUE, cell.column), 0)
    if cell.table != 4 and rows and rows != TABLE_7[cell.column]:
        return f"{rows:,} rows in the data, {TABLE_7[cell.column]:,} in the paper's Table 7"
    return CAUSES.get(model_of(cell.table, cell.row).tokenizer, NO_CAUSE)


def counts(found: list[Cell]) -> dict[str, int]:
    return {
        "close": sum(cell.close for cell in found),
        "equal": sum(cell.equal for cell in found),
        "allowed": sum(cell.ours is not None for cell in found),
        "paper": len(found),
    }


def render(figures: dict[str, Any]) -> str:
    """Count the reproduced cells of each table and of all, and list missing data."""
    found = [read_cell(cell) for cell in figures["cells"]]
    groups = {f"Table {number}": [cell for cell in found if cell.table == number] for number in TABLES}
    groups = {name: group for name, group in groups.items() if group} | {"All": found}
    header = ["", "within 0.1", "same digits", "computed", "in the paper"]
    shown = format_table(header, [[name, *counts(group).values()] for name, group in groups.items()])
    missing = f"Missing data: {', '.join(figures['missing'])}." if figures["missing"] else ""
    return "\n\n".join(filter(None, [shown, missing]))


def read_cell(saved: dict[str, Any]) -> Cell:
    return Cell(**{field.name: saved[field.name] for field in fields(Cell)})


def collect_figures(found: list[Cell], usage: Usage) -> dict[str, Any]:
    """Return the figures of the result file."""
    scans = [
        {"tokenizer": tokenizer, "benchmark": benchmark, "task": task, "rows": usage.rows[benchmark, task]}
        | {"used": len(vocabulary), "vocab_size": vocabulary.vocab_size}
        for (tokenizer, benchmark, task), vocabulary in usage.scanned.items()
    ]
    listed = [asdict(cell) | {"difference": cell.difference, "close": cell.close} for cell in found]
    return {"counts": counts(found), "missing": list(usage.missing), "scans": scans, "cells": listed}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    for name in ("tokenizers", "glue", "xnli"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    parser.add_argument("--tables", type=int, nargs="+", choices=sorted(TABLES), help="default: 2 3 5 6; 4 with XNLI")
    chosen = parser.parse_args()
    chosen.tables = chosen.tables or ([2, 3, 4, 5, 6] if chosen.xnli else [2, 3, 5, 6])
    for folder in (chosen.tokenizers, chosen.glue, chosen.xnli):
        if folder and not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    if {2, 3} & set(chosen.tables) and not (chosen.tokenizers and chosen.glue):
        parser.error("Tables 2 and 3 want --tokenizers DIR and --glue DIR; --tables 5 6 wants neither")
    return chosen


def main() -> None:
    chosen = parse()
    transformers_logging.set_verbosity_error()
    usage = Usage(chosen.tokenizers, {GLUE: chosen.glue, XNLI: chosen.xnli})
    found: list[Cell] = []
    try:
        for number in sorted(set(chosen.tables)):
            of_table = list(cells(number, usage))
            print("\n\n".join(filter(None, [markdown(number, of_table), causes(of_table, usage)])), end="\n\n")
            found += of_table
    except PemaError as error:
        sys.exit(f"{error}")
    figures = collect_figures(found, usage)
    print(f"## Cells\n\n{render(figures)}")
    write_results(chosen, figures)


if __name__ == "__main__":
    main()
