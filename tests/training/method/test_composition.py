"""An adapter with PEMA combined with others: they share one embedding, so only one may have rows."""

import adapters.composition as ac
import pytest
import torch
from adapters import LoRAConfig, MTLLoRAConfig, SeqBnConfig

from pema_adapters import PartialVocabulary, PEMAConfig, shrink_embeddings
from pema_adapters.errors import SurgeryError
from tests.models import MIXED, USED, V, matrix_of, outputs
from tests.training.test_shrink import perturb


@pytest.fixture
def model(case):
    """PEMA in "rows"; "one" and "two" are ordinary bottleneck adapters, "low" is LoRA."""
    model = case.with_adapters()
    for name, config in (
        ("rows", PEMAConfig()),
        ("one", SeqBnConfig()),
        ("two", SeqBnConfig()),
        ("low", LoRAConfig(r=2)),
    ):
        model.add_adapter(name, config=config)
    shrink_embeddings(model, "rows", PartialVocabulary(USED, V))
    perturb(model, "rows")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{adapter}." in name for adapter in ("one", "two", "low")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def oracle(model, case, setup):
    """The outputs of a full model with the rows written in, with the same setup of the other adapters."""
    full = case.with_adapters()
    for name, config in (("one", SeqBnConfig()), ("two", SeqBnConfig()), ("low", LoRAConfig(r=2))):
        full.add_adapter(name, config=config)
    if isinstance(setup, ac.Fuse):
        full.add_adapter_fusion(setup)
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel() and "pema" not in name}
    full.load_state_dict(state, strict=False)
    rows = model.bert.pema.adapters["rows"]
    with torch.no_grad():
        matrix_of(full)[rows.token_ids.long()] = rows.weight
    full.set_active_adapters(setup)
    return full


@pytest.mark.parametrize(("setup", "others"), [
    (ac.Stack("rows", "one"), ac.Stack("one")),
    (ac.Stack("one", "rows", "two"), ac.Stack("one", "two")),
    (ac.Stack("rows", "low"), ac.Stack("low")),
    (ac.Stack("rows", ac.Fuse("one", "two")), ac.Fuse("one", "two")),
    (ac.Stack("rows", ac.Average("one", "two")), ac.Average("one", "two")),
    (ac.Stack("rows", ac.Parallel("one", "two")), ac.Parallel("one", "two")),
    (ac.Stack("rows", ac.BatchSplit("one", "two", batch_sizes=[1, 1])), ac.BatchSplit("one", "two", batch_sizes=[1, 1])),
], ids=str)  # fmt: skip
def test_rows_combine_with_other_adapters(model, case, setup, others):
    if isinstance(others, ac.Fuse):
        model.add_adapter_fusion(others)
    model.set_active_adapters(setup)
    full = oracle(model, case, others)
    for one, other in zip(outputs(model, MIXED), outputs(full, MIXED), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_combine_with_multi_task_lora(model, case):
    """With multi-task LoRA, each example of the batch uses the weights of its task."""
    full = case.with_adapters()
    for one in (model, full):
        for name in ("a", "b"):
            one.add_adapter(name, config=MTLLoRAConfig(r=2))
        one.share_parameters(name="shared", adapter_names=["a", "b"])
        torch.manual_seed(1)
        for name, parameter in sorted(one.named_parameters()):
            if any(added in name for added in (".loras.a.", ".loras.b.", ".shared_parameters.shared.")):
                torch.nn.init.normal_(parameter)
    model.set_active_adapters(ac.Stack("rows", ac.MultiTask("a", "b")))
    full.set_active_adapters(ac.MultiTask("a", "b"))
    rows = model.bert.pema.adapters["rows"]
    with torch.no_grad():
        matrix_of(full)[rows.token_ids.long()] = rows.weight
        tasks = [outputs_of(one, tasks) for one in (model, full) for tasks in (["a", "b"], ["b", "a"])]
    assert torch.equal(tasks[0], tasks[2]) and torch.equal(tasks[1], tasks[3])
    assert not torch.equal(tasks[0], tasks[1])


def outputs_of(model, tasks):
    return model.eval()(input_ids=MIXED["input_ids"][:2], task_ids=tasks).logits


@pytest.mark.parametrize("setup", [
    ac.Parallel("rows", "one"),
    ac.BatchSplit("one", "rows", batch_sizes=[1, 1]),
    ac.Split("rows", "one", splits=2),
    ac.MultiTask("rows", "one"),
    ac.Stack("two", ac.Parallel("rows", "one")),
], ids=str)  # fmt: skip
def test_rows_in_a_parallel_block_are_refused(model, setup):
    with pytest.raises(
        SurgeryError, match=r"adapter 'rows' has embedding rows, which one would use as well.*in a Stack"
    ):
        model.set_active_adapters(setup)
    model.set_active_adapters("rows")


@pytest.mark.parametrize("block", [ac.Stack, ac.Fuse, ac.Average, ac.Parallel])
def test_two_adapters_with_rows_are_refused(model, block):
    model.add_adapter("more", config=PEMAConfig())
    shrink_embeddings(model, "more", PartialVocabulary(USED, V))
    with pytest.raises(SurgeryError, match=r"more, rows are active together .* average_adapter"):
        model.set_active_adapters(block("rows", "more"))
