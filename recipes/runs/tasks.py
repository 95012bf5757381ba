"""Classification tasks of text, as the recipes need them: where the data lie, what is scored, and how.

    GLUE/CoLA/{train,validation,test}.tsv[.gz]      a header; `sentence`, or two columns of text; `label`; no quoting
    XNLI/en/{train,validation,test}.tsv[.gz]        the same, a folder a language

What stands behind a split's name makes further splits of it (validation_matched.tsv.gz). A test split without labels,
as in GLUE, counts for the vocabulary alone.
"""

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

NO_TEXT = {"label", "idx", "index"}

METRICS: Mapping[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy_score,
    "F1": f1_score,
    "Matthews": matthews_corrcoef,
    "Pearson": lambda truth, guess: pearsonr(truth, guess).statistic,
    "Spearman": lambda truth, guess: spearmanr(truth, guess).statistic,
}


class TaskError(Exception):
    """The data of a task cannot be used; the message is one line."""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: as the paper calls it; also its folder in a data folder, whatever the case and punctuation.
        hub: data set on the Hub, and its configuration.
        labels: how many classes; 1 for a number (STS-B).
        metrics: of METRICS, the first is the one that tables show.
        scored: the beginnings of the names of the splits that are scored.
    """

    name: str
    hub: tuple[str, str]
    labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    scored: tuple[str, ...] = ("validation",)

    def load(self, data_dir: Path | None) -> DatasetDict:
        """Load all splits, from a data folder, or from the Hub without one.

        Raises:
            TaskError: no such folder or split, or columns that do not fit.
        """
        data = load_dataset(*self.hub) if data_dir is None else self._of_files(data_dir)
        for needed in ("train", *self.scored):
            if not any(split.startswith(needed) for split in data):
                raise TaskError(f"{self.name}: no split {needed} (found: {', '.join(data) or 'none'})")
        return data

    def _of_files(self, data_dir: Path) -> DatasetDict:
        folders = sorted(path for path in data_dir.iterdir() if path.is_dir()) if data_dir.is_dir() else []
        folder = next((path for path in folders if plain(path.name) == plain(self.name)), None)
        if folder is None:
            there = ", ".join(path.name for path in folders) or "no folders"
            raise TaskError(f"{data_dir}: no folder {self.name} (found: {there}); without --data-dir the Hub is asked")
        files = {path.name.split(".")[0]: str(path) for path in sorted(folder.glob("*.tsv*"))}
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False}
        # Each split by itself: a test split without labels has other columns.
        return DatasetDict(
            {split: load_dataset("csv", data_files=file, split="train", **options) for split, file in files.items()}
        )

    def texts(self, columns: list[str]) -> list[str]:
        """Return the columns of text: one, or two for a pair."""
        found = [column for column in columns if column not in NO_TEXT]
        if len(found) not in {1, 2}:
            raise TaskError(
                f"{self.name}: found the columns {', '.join(columns)}, expected one or two of text, and label"
            )
        return found

    def scores(self, logits: Any, labels: Any) -> dict[str, float]:
        """Compute every metric of the task, of logits [n, classes] (or numbers [n, 1]) and labels [n]."""
        guesses = np.asarray(logits)[:, 0] if self.labels == 1 else np.argmax(logits, axis=-1)
        return {name: float(METRICS[name](labels, guesses)) for name in self.metrics}


@dataclass(frozen=True)
class Benchmark:
    """What differs between the recipes: the tasks, and the paper's hyperparameters that go with them (Table 8)."""

    name: str
    tasks: Mapping[str, Task]
    epochs: float


def plain(name: str) -> str:
    """Return a name without case and punctuation but pluses: SST-2 is sst2, Compacter++ is not Compacter."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "plus"))
