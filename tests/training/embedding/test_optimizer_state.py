"""Optimizer state and gradients stay with their rows; state that cannot be remapped is refused by name."""

import copy

import pytest
import torch
from transformers.optimization import Adafactor

from pema_adapters import PartialVocabulary, load_model, shrink_embeddings
from pema_adapters.errors import SurgeryError
from pema_adapters.training.embedding.partial_rows import PartialRows
from tests.models import V, matrix_of

NOTHING = torch.empty(0, dtype=torch.uint8)


def table_of(*token_ids):
    """A table over a matrix [20, 2] whose row i is (i, i)."""
    table = PartialRows(20, 2, torch.device("cpu"), torch.float32, "base")
    hold(table, *token_ids)
    return table


def hold(table, *token_ids):
    """Set rows for `token_ids`; existing ones keep their values."""
    ids = torch.tensor(token_ids, dtype=torch.int32)
    rows = ids.float().unsqueeze(1).repeat(1, 2)
    known = torch.isin(ids, table.token_ids)
    rows[known] = table.weight.detach()[torch.isin(table.token_ids, ids)]
    table.set_rows(ids, rows, NOTHING)


def step(table, optimizer, **gradients):
    """A step with a gradient of `i3=7` for row 3, none for the others."""
    table.weight.grad = torch.zeros_like(table.weight)
    for name, value in gradients.items():
        table.weight.grad[table.token_ids.tolist().index(int(name[1:]))] = value
    optimizer.step()


def test_rows_keep_their_parameter_gradient_and_momentum():
    table = table_of(3, 9)
    parameter, optimizer = table.weight, torch.optim.SGD(table.parameters(), lr=1, momentum=0.5)
    step(table, optimizer, i3=1, i9=2)
    hold(table, 3, 5, 9)
    assert table.weight is parameter is optimizer.param_groups[0]["params"][0]
    assert parameter.grad[:, 0].tolist() == [1, 0, 2]
    step(table, optimizer, i5=4)
    assert optimizer.state[parameter]["momentum_buffer"][:, 0].tolist() == [0.5, 4, 1]
    assert parameter[:, 0].tolist() == [3 - 1 - 0.5, 5 - 4, 9 - 2 - 1]


OPTIMIZERS = [
    (torch.optim.Adam, {"amsgrad": True}), (torch.optim.AdamW, {"foreach": True}), (torch.optim.AdamW, {"fused": True}),
    (torch.optim.NAdam, {}), (torch.optim.RAdam, {}), (torch.optim.Adadelta, {}), (torch.optim.Adamax, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}), (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), OPTIMIZERS)
def test_added_rows_train_as_if_present_from_the_start(kind, settings):
    early, late = table_of(3, 5, 9), table_of(3, 9)
    for table in (early, late):
        optimizer = kind(table.parameters(), **{"lr": 0.1, "weight_decay": 0.0, **settings})
        for grad in (1.0, -0.5):
            step(table, optimizer, i3=grad, i9=2)
        hold(table, 3, 5, 9)
        for grad in (0.25, 3):
            step(table, optimizer, i5=grad, i9=1)
    assert torch.equal(early.weight, late.weight)


def test_state_saved_with_fewer_rows_is_remapped_when_loaded():
    table = table_of(3, 9)
    optimizer = torch.optim.SGD(table.parameters(), lr=1, momentum=0.5)
    step(table, optimizer, i3=1, i9=2)
    saved = copy.deepcopy(optimizer.state_dict())
    hold(table, 3, 5, 9)
    step(table, optimizer)
    hold(table, 1, 3, 5, 9)
    for again in (optimizer, torch.optim.SGD(table.parameters(), lr=1, momentum=0.5)):
        again.load_state_dict(saved)
        step(table, again)
        assert again.state[table.weight]["momentum_buffer"][:, 0].tolist() == [0, 0.5, 0, 1]


def test_state_of_other_rows_is_refused():
    table, other = table_of(3, 5, 9), table_of(1, 2)
    optimizer, foreign = (torch.optim.SGD(one.parameters(), lr=1, momentum=0.5) for one in (table, other))
    step(other, foreign, i1=1)
    optimizer.load_state_dict(foreign.state_dict())
    with pytest.raises(SurgeryError, match="state of SGD is for 2 embedding rows, the model has 3: load the state"):
        step(table, optimizer, i3=1)


def test_state_stays_with_its_token_when_other_rows_are_loaded():
    table, other = table_of(3, 5, 9), table_of(5, 7)
    optimizer = torch.optim.SGD(table.parameters(), lr=1, momentum=0.5)
    step(table, optimizer, i3=1, i5=2, i9=4)
    table.load_state_dict(other.state_dict())
    step(table, optimizer)
    assert optimizer.state[table.weight]["momentum_buffer"][:, 0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("kind", "row", "column"),
    [(Adafactor, "exp_avg_sq_row", "exp_avg_sq_col"), (torch.optim.Adafactor, "row_var", "col_var")],
)
def test_factored_moments_are_means_over_the_current_rows(kind, row, column):
    early, late = table_of(3, 5, 9), table_of(3, 9)
    found = []
    for table in (early, late):
        settings = {"scale_parameter": False, "relative_step": False} if kind is Adafactor else {}
        optimizer = kind(table.parameters(), lr=0.1, **settings)
        step(table, optimizer, i3=1, i9=2)
        hold(table, 3, 5, 9)
        step(table, optimizer, i5=3)
        found.append(optimizer.state[table.weight])
    for name in (row, column):
        torch.testing.assert_close(found[1][name], found[0][name])


class Blockwise(torch.optim.Optimizer):
    """An optimizer with 8-bit state: bytes in the shape of the weight, and scales for blocks of them."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for weight in self.param_groups[0]["params"]:
            self.state[weight] = {"state1": torch.zeros_like(weight, dtype=torch.uint8), "absmax1": torch.zeros(1)}


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        (Blockwise, {}, r"Blockwise keeps 'state1' \(torch\.uint8 \[2, 2\]\)"),
        (torch.optim.Rprop, {}, r"Rprop keeps 'prev' \(torch\.float32 \[2, 2\]\)"),
        (torch.optim.ASGD, {}, "ASGD keeps 'ax'"),
        (torch.optim.LBFGS, {}, r"LBFGS keeps 'd' \(torch\.float32 \[4\]\)"),
    ],
)
def test_state_that_cannot_be_remapped_is_refused(kind, settings, found):
    table = table_of(3, 9)
    optimizer = kind(table.parameters(), **settings)
    table.weight.grad = torch.ones_like(table.weight)
    closure = (table.weight.grad.sum,) if kind is torch.optim.LBFGS else ()
    optimizer.step(*closure)
    optimizer.step(*closure)
    hold(table, 3, 5, 9)
    with pytest.raises(SurgeryError, match=found + ".* cannot be remapped from 2 rows to 3: train with"):
        optimizer.step(*closure)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_second_stage_of_training_keeps_rows_and_state(case, kind):
    """Compare stages on tokens 3 5 and 5 9, extending the vocabulary between them, with one vocabulary for both."""
    found = []
    for first in ([3, 5], [3, 5, 9]):
        model = (
            case.with_adapters()
            if kind == "adapter"
            else load_model(case.auto_class, case.folder, PartialVocabulary(first, V))
        )
        name = "task" if kind == "adapter" else None
        if name:
            model.add_adapter(name, config="pema")
            shrink_embeddings(model, name, PartialVocabulary(first, V))
            model.train_adapter(name)
        embedding = model.get_input_embeddings()
        weight = model.base_model.pema.adapters["task"].weight if name else matrix_of(model)
        optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
        for ids in ([3, 5], [3, 3], None, [5, 9], [9, 9]):
            if ids is None:
                shrink_embeddings(model, name, PartialVocabulary([5, 9], V))
                continue
            loss = embedding(torch.tensor(ids)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([weight.detach(), *optimizer.state[weight].values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
