"""One training run of one method on one task: see `run`."""

import logging
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

import compacter_baselines as baselines
from harness.child import anonymous_bytes
from pema_adapters import PartialVocabulary
from runs.checkpoints import ResumableTrainer, last_checkpoint
from runs.memory import copy_weights, peak_memory, trim_memory
from runs.tasks import Task, TaskError

PEMA = {"off": baselines.PAPER, "on": baselines.TRAINED, "frozen": baselines.FROZEN}
"""Values of `--pema`, and the columns of recipes/compacter_baselines.py."""
UNTIMED = 3
"""First steps, which allocate memory."""


@dataclass(frozen=True)
class Setting:
    """Everything that decides the result of a run. `train_rows` 0: all; `max_length` in tokens."""

    method: str
    pema: str
    seed: int
    learning_rate: float
    train_rows: int
    base: str
    batch_size: int
    epochs: float
    max_length: int
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    bf16: bool
    group_by_length: bool

    def refuse_other(self, kept: Mapping[str, Any], where: Path) -> None:
        """Raise TaskError where a saved setting is another one."""
        for name, value in asdict(self).items():
            if kept.get(name) != value:
                raise TaskError(
                    f"{where}: made with {name} {kept.get(name)!r}, now asked for with {value!r}: "
                    "give another --output, or delete it"
                )


@dataclass(frozen=True)
class Place:
    """Where a run works: data, checkpoints (every `save_steps` steps; 0: none), threads (0: all), progress bar."""

    data_dir: Path | None
    checkpoints: Path
    save_steps: int
    threads: int
    bar: bool


def run(task: Task, setting: Setting, place: Place) -> dict[str, Any]:
    """Train and score. Returns scores by split, K and V, trained parameters, bytes at the peak, seconds a step.

    Memory is what training takes: the device's peak, or else the peak of anonymous memory beyond what the process held
    before there was a model. Training resumes at the last complete checkpoint of this run, if there is one.
    """
    quiet(place)
    splits, vocabulary = prepare_data(task, setting, place)
    checkpoint = last_checkpoint(place.checkpoints) if place.save_steps else None
    if checkpoint is not None:
        setting.refuse_other(checkpoint.setting, checkpoint.folder)
    trim_memory()
    before = anonymous_bytes()
    set_seed(setting.seed)
    model = AutoModelForSequenceClassification.from_pretrained(setting.base, num_labels=task.labels)
    used = baselines.prepare(model, setting.method, PEMA[setting.pema], vocabulary)
    copy_weights(model)
    trainer = make_trainer(model, task, splits, setting, place)
    steps = Steps()
    trainer.add_callback(steps)
    with peak_memory() as peak:
        training_loss = trainer.resume(checkpoint)
    body, head = baselines.trained_parameters(model)
    return {
        "scores": {name: score(trainer, task, split) for name, split in splits.items() if is_scored(task, name)},
        "rows": len(used),
        "vocab_size": vocabulary.vocab_size,
        "trained_parameters": body,
        "trained_head": head,
        "peak_bytes": peak() if torch.cuda.is_available() else peak() - before,
        "seconds_per_step": statistics.median(steps.seconds[UNTIMED:] or steps.seconds or [0.0]),
        "steps": trainer.state.global_step,
        "train_rows": len(splits["train"]),
        "training_loss": training_loss,
    }


def prepare_data(task: Task, setting: Setting, place: Place) -> tuple[dict[str, Dataset], PartialVocabulary]:
    """Tokenize the splits. Returns them, and the vocabulary of all of them, the paper's convention."""
    tokenizer = AutoTokenizer.from_pretrained(setting.base)
    splits = dict(task.load(place.data_dir))
    if setting.train_rows:
        train = splits["train"].shuffle(seed=0)  # a subset that is the same in all runs
        splits["train"] = train.select(range(min(setting.train_rows, len(train))))
    options = {"truncation": True, "max_length": setting.max_length}

    def encode(rows: dict[str, Any]) -> Any:
        return tokenizer(*[rows[column] for column in texts], **options)

    tokenized = {}
    for name, split in splits.items():
        texts = task.texts(split.column_names)
        tokenized[name] = split.map(
            encode, batched=True, remove_columns=[c for c in split.column_names if c != "label"]
        )
    vocab_size = AutoConfig.from_pretrained(setting.base).vocab_size
    return tokenized, PartialVocabulary.from_dataset(list(tokenized.values()), vocab_size=vocab_size, progress=False)


def make_trainer(
    model: Any, task: Task, splits: dict[str, Dataset], setting: Setting, place: Place
) -> ResumableTrainer:
    arguments = TrainingArguments(
        output_dir=str(place.checkpoints), seed=setting.seed, report_to=[], disable_tqdm=not place.bar,
        per_device_train_batch_size=setting.batch_size, per_device_eval_batch_size=2 * setting.batch_size,
        num_train_epochs=setting.epochs, learning_rate=setting.learning_rate, warmup_ratio=setting.warmup_ratio,
        weight_decay=setting.weight_decay, max_grad_norm=setting.max_grad_norm, bf16=setting.bf16,
        use_cpu=not torch.accelerator.is_available(),
        group_by_length=setting.group_by_length,
        save_strategy="steps" if place.save_steps else "no", save_steps=place.save_steps or 500,
        save_safetensors=False,  # some methods have one tensor in two places, which safetensors refuses
        logging_strategy="no", dataloader_pin_memory=torch.cuda.is_available(), label_names=["labels"],
    )  # fmt: skip
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(setting.base))
    trainer = ResumableTrainer(
        model=model, args=arguments, train_dataset=splits["train"], data_collator=collator, setting=asdict(setting)
    )
    trainer.compute_metrics = lambda found: task.scores(found.predictions, found.label_ids)
    trainer.remove_callback(PrinterCallback)
    return trainer


def is_scored(task: Task, split: str) -> bool:
    return split.startswith(task.scored)


def score(trainer: ResumableTrainer, task: Task, split: Dataset) -> dict[str, float]:
    found = trainer.evaluate(split)
    return {name: found[f"eval_{name}"] for name in task.metrics}


class Steps(TrainerCallback):
    """Seconds of each step, forward to optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def quiet(place: Place) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if place.threads:
        torch.set_num_threads(place.threads)
    transformers_logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    if not place.bar:
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
