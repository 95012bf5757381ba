"""One cell of the matrix of tools/compatibility.py: a model, a method and a head, from training to merging.

    add_adapter, shrink_embeddings, three steps; then: the same function as the full model with the rows written in,
    nothing [V, d] alive, save and load, merge, and the base's function where the adapter is not active

A cell that fails is tried again with the method alone, to tell failures of adapters from those of PEMA.
"""

import gc
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import adapters
import torch
from torch import Tensor
from torch.nn import functional

from compat.models import FAMILIES, LM_HEADS, USED, WITHOUT_TEXT, Family, V, adapter_config
from pema_adapters import PartialVocabulary, merge_checkpoint, shrink_embeddings
from pema_adapters.errors import SurgeryError

NAME, CLASSES, STEPS = "task", 3, 3
OK, THEIRS, OURS, NONE, REFUSED = "ok", "adapters", "ours", "none", "refused"


@dataclass(frozen=True)
class Cell:
    """A model, a method and a head to try together."""

    model: str
    method: str
    head: str


@dataclass(frozen=True)
class Result:
    """The outcome of a cell.

    Args:
        status: "ok", "adapters" (fails without PEMA, too), "ours", or "none" (PEMA says that it does not apply).
        reason: in one line.
        seconds: how long it took.
        changed: whether `adapters.init` by itself changes what the model computes.
    """

    cell: Cell
    status: str
    reason: str = ""
    seconds: float = 0.0
    changed: bool = False


class Difference(Exception):
    """Raised where two models that must compute the same do not, or a matrix is alive."""


@dataclass
class Bench:
    """A checkpoint of one model with one head, on disk, and models loaded from it."""

    family: Family
    head: str
    folder: Path

    def __post_init__(self) -> None:
        self.config = self.family.config()
        if not self.family.is_bare(self.head) and self.head not in LM_HEADS:
            self.config.num_labels = CLASSES
        torch.manual_seed(3)
        self._make().save_pretrained(self.folder)

    def _make(self) -> Any:
        return build_model(self.family.model_class(self.head), self.config)

    @cached_property
    def changed_by_init(self) -> bool:
        """Whether `adapters.init` alone changes what the model computes."""
        with torch.no_grad():
            one, other = (self.outputs(make(), unseen=True) for make in (self.plain, self.fresh))
        return not same(one, other)

    def plain(self, folder: Path | None = None) -> Any:
        torch.manual_seed(7)
        return self.family.model_class(self.head).from_pretrained(folder or self.folder).eval()

    def fresh(self, folder: Path | None = None) -> Any:
        """Load the model and call adapters.init."""
        model = self.plain(folder)
        adapters.init(model)
        return model

    def outputs(self, model: Any, *, unseen: bool) -> Tensor:
        """Return the logits; without a head, the last hidden state."""
        given = self.family.inputs(self.config, self.head, unseen=unseen)
        out = model(**given)
        return out[0] if self.family.is_bare(self.head) else out.logits

    def loss(self, model: Any) -> Tensor:
        found = self.outputs(model, unseen=False)
        if self.family.is_bare(self.head):
            fixed = torch.randn(found.shape[-1], CLASSES, generator=torch.Generator().manual_seed(2))
            found = found.mean(1) @ fixed
        if self.head in LM_HEADS:
            targets = torch.tensor(USED).repeat(found[..., 0].numel())[: found[..., 0].numel()]
            return functional.cross_entropy(found.flatten(0, -2), targets)
        return functional.cross_entropy(found, torch.tensor([0, 2]))


def build_model(model_class: Any, config: Any) -> Any:
    """Build a model with random weights; classes of Transformers and Auto classes name that differently."""
    build = model_class._from_config if hasattr(model_class, "_from_config") else model_class.from_config
    return build(config)


def check(cell: Cell, bench: Bench, *, pema: bool = True) -> None:
    """Raise the first error or difference from training to the merged model."""
    with tempfile.TemporaryDirectory() as name:
        model = _train(cell, bench, pema)
        if pema:
            _compare("trained", bench, model, _make_oracle(cell, bench, model))
        saved = Path(name, "run")
        with torch.no_grad():
            _save(model, saved)
            _compare("loaded", bench, _with_adapter(bench.fresh(), saved), model)
            if pema:
                _compare("merged", bench, _merge_and_load(bench, saved, Path(name, "merged")), model)
            _check_base(bench, model)


def _train(cell: Cell, bench: Bench, pema: bool) -> Any:
    model, config = bench.fresh(), adapter_config(cell.method, pema=pema)
    if config is not None:
        model.add_adapter(NAME, config=config)
        if pema:
            shrink_embeddings(model, NAME, PartialVocabulary(USED, V))
        model.train_adapter(NAME)
    moving = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        bench.loss(model).backward()
        optimizer.step()
    still = [name for name, each in model.named_parameters() if name in moving and torch.equal(each, moving[name])]
    if len(still) == len(moving) or any(".pema." in f".{name}" for name in still):
        raise Difference(f"training did not move {', '.join(still[:3])}")
    del moving
    if pema:
        _expect_no_matrix(model, int(cell.head in LM_HEADS))  # while the optimizer is alive
    optimizer.zero_grad()
    return model.eval()


def _expect_no_matrix(model: Any, allowed: int) -> None:
    """Raise where matrices [V, d] are alive; a trained head of its own has a gradient and two moments, too."""
    if any(each.requires_grad and _is_matrix(each) for each in model.parameters()):
        allowed = 4
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and _is_matrix(each)]
    places = {each.untyped_storage().data_ptr() for each in found}
    places |= {each.grad.untyped_storage().data_ptr() for each in found if each.is_leaf and each.grad is not None}
    if len(places) > allowed:
        raise Difference(f"{len(places)} tensors [V, d] are alive, expected {allowed}")


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[0] == V and tensor.device.type != "meta"


def _make_oracle(cell: Cell, bench: Bench, model: Any) -> Any:
    """Build the full model with the method alone, trained weights copied by name, and the rows written into E."""
    full, config = bench.fresh(), adapter_config(cell.method, pema=False)
    if config is not None:
        full.add_adapter(NAME, config=config, set_active=True)
    expected = full.state_dict()
    state = {name: each for name, each in model.state_dict().items() if name in expected}
    fitting = {name: each for name, each in state.items() if each.shape == expected[name].shape}
    full.load_state_dict(fitting, strict=False)  # all but the matrix
    rows = model.base_model.pema.adapters[NAME]
    with torch.no_grad():
        full.get_input_embeddings().weight[rows.token_ids.long()] = rows.weight
    return full.eval()


def _save(model: Any, folder: Path) -> None:
    if model.has_adapters():
        model.save_adapter(str(folder), NAME, use_safetensors=True)


def _with_adapter(model: Any, saved: Path) -> Any:
    if saved.exists():
        model.load_adapter(str(saved), set_active=True, use_safetensors=True)
    return model.eval()


def _merge_and_load(bench: Bench, saved: Path, folder: Path) -> Any:
    """Merge, and load the result; with the plain class if no adapter is left."""
    report = merge_checkpoint(bench.folder, saved, folder, verify=True)
    if not report.adapters_left and not bench.changed_by_init:
        return bench.plain(folder)
    return _with_adapter(bench.fresh(folder), folder / "adapters" / NAME)


def _check_base(bench: Bench, model: Any) -> None:
    """Raise unless the model without its adapter is the base (with the trained head), and with it another."""
    base = bench.fresh()
    own = dict(base.named_parameters())
    for name, each in model.named_parameters():
        if each.requires_grad and name in own:
            own[name].copy_(each)
    if not model.has_adapters():
        return
    if same(*(bench.outputs(each, unseen=False) for each in (model, base))):
        raise Difference("the trained adapter changes nothing")
    model.set_active_adapters(None)
    _compare("deactivated", bench, model, base)


def _compare(stage: str, bench: Bench, one: Any, other: Any) -> None:
    """Raise where two models differ for tokens in the vocabulary or outside."""
    for unseen in (False, True):
        with torch.no_grad():
            left, right = (bench.outputs(model.eval(), unseen=unseen) for model in (one, other))
        if not same(left, right):
            far = f" by {(left - right).abs().max():.1g}" if left.shape == right.shape else ""
            where = "tokens outside the vocabulary" if unseen else "tokens in the vocabulary"
            raise Difference(f"{stage}: another function{far} ({where})")


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal up to rounding, which is relative to the largest value."""
    if left.shape != right.shape:
        return False
    return torch.allclose(left, right, rtol=1e-4, atol=1e-5 * max(1.0, float(right.abs().max())))


class Benches:
    """Checkpoints, each made once, in a folder that `close` removes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="compatibility-"))
        self._made: dict[tuple[str, str], Bench] = {}

    def get(self, model: str, head: str) -> Bench:
        if (model, head) not in self._made:
            folder = self.folder / f"{model}-{head}".replace(" ", "-")
            self._made[model, head] = Bench(FAMILIES[model], head, folder)
        return self._made[model, head]

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def run(cell: Cell, benches: Benches) -> Result:
    """Return the result of a cell, whatever happens in it."""
    start = time.perf_counter()
    status, reason = _without_text(cell) if cell.model in WITHOUT_TEXT else _judge(cell, benches)
    changed = status == OK and benches.get(cell.model, cell.head).changed_by_init
    return Result(cell, status, reason, time.perf_counter() - start, changed)


def _judge(cell: Cell, benches: Benches) -> tuple[str, str]:
    failure = attempt(lambda: check(cell, benches.get(cell.model, cell.head)))
    if failure is None:
        return OK, ""
    if isinstance(failure, SurgeryError) and "PEMA does not apply" in str(failure):
        return NONE, short(failure)
    alone = attempt(lambda: check(cell, benches.get(cell.model, cell.head), pema=False))
    return (OURS, short(failure)) if alone is None else (THEIRS, short(alone))


def _without_text(cell: Cell) -> tuple[str, str]:
    model = WITHOUT_TEXT[cell.model]()
    adapters.init(model)
    refusal = attempt(lambda: model.add_adapter(NAME, config=adapter_config(cell.method, pema=True)))
    return (NONE if isinstance(refusal, SurgeryError) else OURS), short(refusal)


def attempt(work: Callable[[], Any]) -> Exception | None:
    """Return the exception of `work`, None without one. Its traceback is removed: it would keep the models alive."""
    try:
        work()
    except Exception as error:
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return error
    return None


def short(error: Exception | None) -> str:
    """Return type and first line of an error, without configs and sizes."""
    if error is None:
        return "no error, where one was expected"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = re.sub(r"(Adapter config or type) '.*' is not", r"\1 is not", line)
    line = re.sub(r" \(\d+\)", "", line)
    line = line if isinstance(error, Difference) else f"{type(error).__name__}: {line}"
    return line if len(line) <= 200 else line[:197] + "..."
