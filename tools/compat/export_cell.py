"""One cell of the table of tools/exports.py: a trained model is exported, loaded again, and compared with itself.

Every export is a pair: `write` leaves files in a folder, by the calls that users make, and `load` reads them back as
users do. The trained model is small, and a full model with the rows written in computes the same (compat/cell.py).
"""

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from torch import Tensor
from transformers import Trainer, TrainingArguments

from compat.cell import Bench, Benches, same
from compat.models import ALONE, FAMILIES, USED, V, adapter_config
from pema_adapters import (
    PartialVocabulary,
    PemaError,
    load_model,
    merge_checkpoint,
    restore_embeddings,
    save_delta,
    shrink_embeddings,
)  # fmt: skip
from pema_adapters.merging.load_snippet import RemainingAdapterFiles, load_snippet

NAME, STEPS = "task", 3
EQUAL, REFUSED, WARNED, ADAPTERS, WRONG = "equal", "refused", "warned", "adapters", "WRONG"
PLAIN, AUTO, FULL = "plain class", "AutoAdapterModel", "full fine-tuning"
FLEXIBLE_HEADS = {
    "classification": lambda model: model.add_classification_head(NAME, num_labels=3),
    "masked": lambda model: model.add_masked_lm_head(NAME),
    "causal": lambda model: model.add_causal_lm_head(NAME),
    "seq2seq": lambda model: model.add_seq2seq_lm_head(NAME),
}


@dataclass(frozen=True)
class Cell:
    """One export to try. `form`: the kind of model, one of PLAIN, AUTO and FULL."""

    export: str
    form: str
    model: str
    head: str
    method: str


@dataclass(frozen=True)
class Result:
    """The outcome of a cell.

    Args:
        status: "equal"; "refused" (a PemaError); "warned" (another function, announced in one line); "adapters" (wrong
            or impossible without PEMA, too); "WRONG".
        reason: in one line.
    """

    cell: Cell
    status: str
    reason: str = ""


class BiasedBench(Bench):
    """A checkpoint whose biases are not 0, as in any trained model: methods that scale outputs scale them, too."""

    def _make(self) -> Any:
        made = super()._make()
        with torch.no_grad():
            for name, each in made.named_parameters():
                if name.endswith("bias"):
                    each.add_(0.2 * torch.randn_like(each))
        return made


class BiasedBenches(Benches):
    """Checkpoints with biases, each made once."""

    def get(self, model: str, head: str) -> Bench:
        if (model, head) not in self._made:
            self._made[model, head] = BiasedBench(FAMILIES[model], head, self.folder / f"{model}-{head}")
        return self._made[model, head]


@dataclass
class Subject:
    """A model in one form with its checkpoint, for an export and its loading."""

    cell: Cell
    bench: Bench
    pema: bool = True

    def fresh(self, folder: Path | None = None) -> Any:
        """Load the base, or another checkpoint of it, with adapters initialized and a head, without an adapter."""
        if self.cell.form != AUTO:
            return self.bench.fresh(folder)
        model = adapters.AutoAdapterModel.from_pretrained(folder or self.bench.folder)
        if NAME not in model.heads:
            torch.manual_seed(7)
            FLEXIBLE_HEADS[self.cell.head](model)
        return model.eval()

    def train(self) -> Any:
        """Train a model for a few steps."""
        model = self._shrink()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.bench.loss(model).backward()
            optimizer.step()
        return model.eval()

    def _shrink(self) -> Any:
        vocabulary = PartialVocabulary(USED, V)
        if self.cell.form == FULL:
            torch.manual_seed(7)
            return load_model(self.bench.family.model_class(self.cell.head), self.bench.folder, vocabulary)
        model = self.fresh()
        model.add_adapter(NAME, config=adapter_config(self.cell.method, pema=self.pema))
        if self.pema:
            shrink_embeddings(model, NAME, vocabulary)
        model.train_adapter(NAME)
        return model

    def outputs(self, model: Any) -> list[Tensor]:
        """Return logits for tokens in the vocabulary, and for some outside."""
        with torch.no_grad():
            return [self.bench.outputs(model.eval(), unseen=unseen).clone() for unseen in (False, True)]

    def with_adapter(self, model: Any, folder: Path) -> Any:
        """Load the adapter in `folder` into the model, with its head, and activate it."""
        model.load_adapter(str(folder))
        model.set_active_adapters(NAME)
        return model.eval()


@dataclass(frozen=True)
class Export:
    """Files from a model, and a model from files. `forms`: where it applies."""

    write: Callable[[Subject, Any, Path], Any]
    load: Callable[[Subject, Path], Any]
    forms: tuple[str, ...] = (PLAIN, AUTO, FULL)


def _write_merged(subject: Subject, model: Any, folder: Path) -> None:
    run = folder.with_name("run")
    if subject.cell.form == FULL:
        save_delta(model, run)
    else:
        model.save_adapter(str(run), NAME, use_safetensors=True)
    merge_checkpoint(subject.bench.folder, run, folder, verify=True)


def _load_merged(subject: Subject, folder: Path) -> Any:
    """Load the output by the lines that pema-merge prints."""
    left = {each.name: RemainingAdapterFiles.read(partial(_read, each)) for each in sorted(folder.glob("adapters/*"))}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"adapters": adapters, "transformers": transformers}
    exec("\n".join(load_snippet(str(folder), config, left, lambda name: repr(f"{folder}/adapters/{name}"))), names)
    return names["model"].eval()


def _read(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if (folder / name).is_file() else None


def _load_plain(subject: Subject, folder: Path) -> Any:
    """Load the checkpoint, and the remaining adapter beside it if there is one."""
    rest = folder / "adapters" / NAME
    return subject.with_adapter(subject.fresh(folder), rest) if rest.exists() else subject.bench.plain(folder)


def _write_restored(subject: Subject, model: Any, folder: Path) -> None:
    restore_embeddings(model)
    model.save_pretrained(folder)
    if subject.cell.form == PLAIN and NAME in model.adapters_config.adapters:
        Path(folder, "adapters").mkdir()
        model.save_adapter(str(folder / "adapters" / NAME), NAME, use_safetensors=True)


def _write_merge_adapter(subject: Subject, model: Any, folder: Path) -> None:
    model.merge_adapter(NAME)
    model.save_pretrained(folder)


def _load_checkpoint(subject: Subject, folder: Path) -> Any:
    """Load the checkpoint: a plain class ignores adapter weights in it, AutoAdapterModel loads them."""
    if subject.cell.form != AUTO:
        return _load_plain(subject, folder)
    model = subject.fresh(folder)
    if NAME in model.adapters_config.adapters:
        model.set_active_adapters(NAME)
    return model


def _load_inactive(subject: Subject, folder: Path) -> Any:
    """Load the checkpoint without activating the adapter, which is in the weights."""
    return subject.fresh(folder) if subject.cell.form == AUTO else subject.bench.plain(folder)


def _save_with(trainer_class: Any) -> Callable[[Subject, Any, Path], None]:
    def write(subject: Subject, model: Any, folder: Path) -> None:
        arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True)
        trainer_class(model=model, args=arguments).save_model(str(folder))

    return write


def _load_artifact(subject: Subject, folder: Path) -> Any:
    return subject.with_adapter(subject.fresh(), folder / NAME)


EXPORTS = {
    "pema-merge": Export(_write_merged, _load_merged),
    "restore_embeddings + save_pretrained": Export(_write_restored, _load_checkpoint),
    "merge_adapter + save_pretrained": Export(_write_merge_adapter, _load_inactive, (PLAIN, AUTO)),
    "save_pretrained": Export(lambda _, model, folder: model.save_pretrained(folder), _load_checkpoint),
    "AdapterTrainer.save_model": Export(_save_with(adapters.AdapterTrainer), _load_artifact, (PLAIN, AUTO)),
    "Trainer.save_model": Export(_save_with(Trainer), _load_checkpoint),
    "save_all_adapters": Export(
        lambda _, model, folder: model.save_all_adapters(str(folder)), _load_artifact, (PLAIN, AUTO)
    ),
}


def run(cell: Cell, benches: BiasedBenches) -> Result:
    """Export, load and compare. A cell that is wrong is tried without PEMA, too, to find failures of adapters."""
    result = _attempt(Subject(cell, benches.get(cell.model, cell.head)))
    if result.status not in (WRONG, WARNED) or cell.form == FULL or cell.method == ALONE:
        return result
    alone = _attempt(Subject(cell, benches.get(cell.model, cell.head), pema=False))
    return Result(cell, ADAPTERS, alone.reason) if alone.status == WRONG and result.status == WRONG else result


def _attempt(subject: Subject) -> Result:
    cell, export = subject.cell, EXPORTS[subject.cell.export]
    try:
        with tempfile.TemporaryDirectory() as name, _warnings() as lines:
            folder = Path(name, "out")
            model = subject.train()
            expected = subject.outputs(model)
            lines.clear()
            export.write(subject, model, folder)
            difference = _difference("exported", subject.outputs(model), expected)
            told = list(lines)
            difference = difference or _difference("loaded", subject.outputs(export.load(subject, folder)), expected)
    except PemaError as error:
        return Result(cell, REFUSED, _without_folders(subject, str(error)))
    except Exception as error:
        line = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return Result(cell, WRONG, _without_folders(subject, line))
    if not difference:
        return Result(cell, EQUAL)
    return Result(cell, *((WARNED, _without_folders(subject, told[0])) if len(told) == 1 else (WRONG, difference)))


def _without_folders(subject: Subject, line: str) -> str:
    """Return the line without folders, so that equal reasons are equal lines."""
    return re.sub(rf"{tempfile.gettempdir()}/tmp\w+", "", line).replace(f"{subject.bench.folder.parent}/", "")


def _difference(stage: str, found: list[Tensor], expected: list[Tensor]) -> str:
    """Describe the first difference, "" without one."""
    for where, one, other in zip(("in", "outside"), found, expected, strict=True):
        if not same(one, other):
            far = f"{(one - other).abs().max():.2g} of {other.abs().max():.2g}" if one.shape == other.shape else "shape"
            return f"{stage}: off by {far} for tokens {where} the vocabulary"
    return ""


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings that pema_adapters logs in the block."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("pema_adapters")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
