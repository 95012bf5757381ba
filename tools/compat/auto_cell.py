"""One cell of `tools/compatibility.py --auto`: AutoAdapterModel with a flexible head, merged and loaded as printed.

    add_adapter, a flexible head, shrink_embeddings, three steps, save_adapter; then `pema-merge`, and the result loaded
    by exactly the lines that it prints (where it prints none: by the class that config.json names)

The merged model must compute what the trained one does, or one of the two refuses in one line.
"""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import ConfigUnion
from torch import Tensor
from torch.nn import functional

from compat.cell import (
    NAME,
    NONE,
    OK,
    OURS,
    REFUSED,
    STEPS,
    THEIRS,
    Cell,
    Difference,
    Result,
    attempt,
    build_model,
    same,
    short,
)
from compat.models import ALONE, FAMILIES, USED, Family, V, adapter_config
from pema_adapters import PartialVocabulary, PEMAConfig, shrink_embeddings
from pema_adapters.cli.merge import main as pema_merge
from pema_adapters.errors import PemaError

HEADS: dict[str, dict[str, Any]] = {
    "classification": {"head_type": "classification", "num_labels": 3},
    "multilabel": {"head_type": "multilabel_classification", "num_labels": 4},
    "tagging": {"head_type": "tagging", "num_labels": 5},
    "qa": {"head_type": "question_answering"},
    "masked": {"head_type": "masked_lm"},
    "causal": {"head_type": "causal_lm"},
    "seq2seq": {"head_type": "seq2seq_lm"},
}
LM_HEADS = ("masked", "causal", "seq2seq")
POLICIES: dict[str, dict[str, Any]] = {
    "tied": {},
    "full": {"output_embeddings": "full"},
    "grow": {"output_embeddings": "full", "vocabulary": "grow"},
}
"""Arguments of `PEMAConfig` about the output."""
BASES = ("bare", "lm")
"""The base checkpoint: of the backbone alone, or of a language model."""
METHODS = (ALONE, "lora", "ia3", "seq_bn", "seq_bn_inv", "compacter", "mam", "prefix_tuning")
MODELS = ("albert", "bart", "bert", "distilbert", "electra", "gpt2", "roberta", "t5", "xlm-roberta")
METHODS_ON_LM = (ALONE, "lora", "seq_bn_inv", "compacter")
"""Methods that are tried on the base of a language model, too."""


@dataclass(frozen=True)
class AutoCell(Cell):
    """A combination to try. `head`: one of HEADS, or "base": that of a base with a head, which adapters converts."""

    policy: str = "tied"
    base: str = "bare"


@dataclass
class AutoBench:
    """A base checkpoint on disk, and AutoAdapterModels with a flexible head of it."""

    family: Family
    base: str
    folder: Path

    def __post_init__(self) -> None:
        self.config = self.family.config()
        torch.manual_seed(3)
        cls = self.family.model_class(self.family.heads[0]) if self.base == "lm" else transformers.AutoModel
        made = build_model(cls, self.config)
        made.save_pretrained(self.folder, state_dict=self._with_pooler(made))

    def _with_pooler(self, model: Any) -> dict[str, Tensor]:
        """Return the state of a base, with the pooler that AutoAdapterModel reads and published checkpoints have."""
        inside = "" if model.base_model is model else f"{model.base_model_prefix}."
        bare = transformers.AutoModel.from_config(self.config).state_dict()
        return {inside + name: each for name, each in bare.items() if "pooler" in name} | model.state_dict()

    def model(self, head: str, folder: Path | None = None) -> Any:
        """Load a model, with a new head unless it is that of the base ("base") or yet to be loaded ("")."""
        torch.manual_seed(7)
        model = adapters.AutoAdapterModel.from_pretrained(folder or self.folder)
        if head in HEADS:
            model.add_prediction_head_from_config(NAME, dict(HEADS[head]))
        return model.eval()

    @cached_property
    def head_types(self) -> list[str]:
        return list(adapters.AutoAdapterModel.from_config(self.family.config()).head_types)

    def outputs(self, model: Any, head: str, *, unseen: bool) -> Tensor:
        """Return all logits [..., C]."""
        kind = head if head in LM_HEADS else "classification"
        if head == "base" and "seq2seq" in self.family.heads:
            kind = "seq2seq"
        made = model(**self.family.inputs(self.config, kind, unseen=unseen))
        return torch.stack([made.start_logits, made.end_logits]) if "start_logits" in made else made.logits

    def loss(self, model: Any, head: str) -> Tensor:
        found = self.outputs(model, head, unseen=False).flatten(0, -2)
        return functional.cross_entropy(found, torch.tensor(USED).repeat(len(found))[: len(found)] % found.shape[-1])


def auto_cells(models: tuple[str, ...], methods: tuple[str, ...], heads: tuple[str, ...]) -> list[list[AutoCell]]:
    """Return the cells to try, in groups that share a checkpoint."""
    groups = []
    for model in models:
        for base in BASES if FAMILIES[model].heads else BASES[:1]:
            kinds = [head for head in heads if head in LM_HEADS or base == "bare"] + ["base"] * (base == "lm")
            groups += [
                [
                    AutoCell(model, method, head, policy, base)
                    for method in methods
                    for policy in _policies(head)
                    if base == "bare" or method in METHODS_ON_LM
                ]
                for head in kinds
            ]
    return groups


def _policies(head: str) -> tuple[str, ...]:
    return tuple(POLICIES) if head in (*LM_HEADS, "base") else ("tied",)


class AutoBenches:
    """Checkpoints, each made once, in a folder that its owner removes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[tuple[str, str], AutoBench] = {}

    def get(self, model: str, base: str) -> AutoBench:
        if (model, base) not in self._made:
            folder = self.folder / f"auto-{model}-{base}".replace(" ", "-")
            self._made[model, base] = AutoBench(FAMILIES[model], base, folder)
        return self._made[model, base]


def run_auto(cell: AutoCell, benches: AutoBenches) -> Result:
    """Return the result of a cell, whatever happens in it."""
    start = time.perf_counter()
    status, reason = _judge(cell, benches)
    return Result(cell, status, reason, time.perf_counter() - start)


def _judge(cell: AutoCell, benches: AutoBenches) -> tuple[str, str]:
    try:
        bench = benches.get(cell.model, cell.base)
        has_head = cell.head == "base" or HEADS[cell.head]["head_type"] in bench.head_types
    except Exception as error:
        return NONE, short(error)
    if not has_head:
        return NONE, f"no flexible head {cell.head!r}"
    failure = attempt(lambda: _check(cell, bench))
    if failure is None:
        return OK, ""
    if isinstance(failure, PemaError):
        return REFUSED, short(failure)
    alone = attempt(lambda: _check_alone(cell, bench))
    return (OURS, short(failure)) if alone is None else (THEIRS, short(alone))


def _check(cell: AutoCell, bench: AutoBench) -> None:
    """Raise `Difference` where the merged model differs, or the refusal of PEMA."""
    with tempfile.TemporaryDirectory() as name:
        model = _train(cell, bench, pema=True)
        model.save_adapter(str(Path(name, "run")), NAME, use_safetensors=True)
        merged = _load_as_printed(bench.folder, Path(name, "run"), Path(name, "merged"))
        _compare(cell, bench, merged, model)


def _check_alone(cell: AutoCell, bench: AutoBench) -> None:
    """Check the same without PEMA: saved, and loaded again onto the base."""
    with tempfile.TemporaryDirectory() as name:
        model = _train(cell, bench, pema=False)
        if not model.has_adapters():
            bench.outputs(model, cell.head, unseen=True)
            return
        model.save_adapter(name, NAME, use_safetensors=True)
        fresh = bench.model("base" if cell.head == "base" else "")
        fresh.load_adapter(name, set_active=True, use_safetensors=True)
        _compare(cell, bench, fresh, model)


def _train(cell: AutoCell, bench: AutoBench, *, pema: bool) -> Any:
    model, config = bench.model(cell.head), adapter_config(cell.method, pema=pema)
    if pema:
        ours = PEMAConfig(**POLICIES[cell.policy])
        others = [one for one in getattr(config, "configs", ()) if not isinstance(one, PEMAConfig)]
        config = ConfigUnion(ours, *others) if others else ours
    if config is not None:
        model.add_adapter(NAME, config=config)
        if pema:
            shrink_embeddings(model, NAME, None if cell.policy == "grow" else PartialVocabulary(USED, V))
        model.train_adapter(NAME)
    if cell.head == "base":  # save_adapter saves the head of the adapter's name alone
        model.heads.requires_grad_(False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad] or [torch.zeros(1)], 1e-2)
    model.train()
    for _ in range(STEPS if config is not None else 0):
        optimizer.zero_grad()
        bench.loss(model, cell.head).backward()
        optimizer.step()
    return model.eval()


def _load_as_printed(base: Path, delta: Path, output: Path) -> Any:
    """Run `pema-merge`, and load its output by the lines that it prints."""
    said, refused = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(refused):
        code = pema_merge(["--base", str(base), "--delta", str(delta), "--output", str(output), "--verify"])
    if code:
        raise PemaError(refused.getvalue().strip().removeprefix("pema-merge: ").replace(str(delta.parent), ""))
    names = {"adapters": adapters, "transformers": transformers}
    torch.manual_seed(11)
    exec("\n".join(_find_printed_lines(said.getvalue())) or _load_line_by_config(output), names)
    return names["model"].eval()


def _find_printed_lines(said: str) -> Iterator[str]:
    _, _, below = said.partition("load both, in Python")
    return (line.strip() for line in below.splitlines()[1:])


def _load_line_by_config(output: Path) -> str:
    name = json.loads((output / "config.json").read_bytes())["architectures"][0]
    return f"model = transformers.{name}.from_pretrained({str(output)!r})"


def _compare(cell: AutoCell, bench: AutoBench, one: Any, other: Any) -> None:
    """Raise where two models differ for tokens in the vocabulary or outside."""
    for unseen in (False, True):
        with torch.no_grad():
            left, right = (_outputs(bench, each, cell.head, unseen) for each in (one, other))
        if not same(left, right):
            far = (
                f" by {(left - right).abs().max():.2g} of {right.abs().max():.2g}" if left.shape == right.shape else ""
            )
            where = "tokens outside the vocabulary" if unseen else "tokens in the vocabulary"
            raise Difference(f"merged: {type(one).__name__} is another function{far} ({where})")


def _outputs(bench: AutoBench, model: Any, head: str, unseen: bool) -> Tensor:
    try:
        return bench.outputs(model, head, unseen=unseen)
    except AttributeError:
        raise Difference(f"merged: {type(model).__name__} has no head of this kind") from None
