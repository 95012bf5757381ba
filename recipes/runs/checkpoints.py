"""Checkpoints from which an interrupted run resumes to the very result of an uninterrupted one.

    checkpoint-40/...             what Trainer writes, file by file
    checkpoint-40/recipe.json     the setting of the run, and the sum of the losses; written last, atomically

A checkpoint without recipe.json is incomplete and ignored.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from harness.results import replace_file

MARK = "recipe.json"


class ResumableTrainer(Trainer):
    """A Trainer whose mean loss includes the steps before its checkpoint.

    Trainer itself sums the steps since the checkpoint, and divides by all.

    Attributes:
        losses: their sum, of single precision and in the order of the steps, as Trainer's: the last digit is the same.
        setting: what checkpoints say of the run.
    """

    def __init__(self, *args: Any, setting: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.setting = setting
        self.losses = torch.tensor(0.0, device=self.args.device)
        self.add_callback(_MarkComplete(self))

    def resume(self, checkpoint: "Checkpoint | None") -> float:
        """Train from a complete checkpoint, or from the start. Returns the mean loss of all steps."""
        if checkpoint is not None:
            self.losses.fill_(checkpoint.losses)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
        return float(self.losses.item() / max(self.state.global_step, 1))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        mean = self.losses / (1 + self.state.global_step)  # for nan and infinity Trainer takes this, too
        self.losses = self.losses + torch.where(torch.isfinite(loss), loss, mean)
        return loss


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: the setting of its run, and the sum of the losses so far."""

    folder: Path
    setting: dict[str, Any]
    losses: float


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run, None if there is none."""
    whole = [mark.parent for mark in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{MARK}")]
    last = max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)
    return None if last is None else Checkpoint(last, **json.loads((last / MARK).read_text()))


class _MarkComplete(TrainerCallback):
    """Marks a checkpoint as complete after Trainer wrote it, and only then removes the older ones."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        sync_files(checkpoint)
        mark = {"setting": self.trainer.setting, "losses": self.trainer.losses.item()}
        replace_file(checkpoint / MARK, json.dumps(mark).encode())
        for other in checkpoint.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if other != checkpoint:
                shutil.rmtree(other, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Flush the files of a folder to the disk, before the mark that vouches for them is written."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
