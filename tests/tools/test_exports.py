"""Exports beside the trained model: a part of the table that tools/exports.py makes."""

import sys

import pytest
import torch

from tests.paths import TOOLS

sys.path.append(str(TOOLS))

from compat.export_cell import (
    ADAPTERS,
    AUTO,
    EQUAL,
    EXPORTS,
    FULL,
    PLAIN,
    WARNED,
    WRONG,
    BiasedBenches,
    Cell,
    Result,
    run,
)
from compat.models import ALONE
from exports import cells, markdown
from pema_adapters.training.method import merged_rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

MERGE = "merge_adapter + save_pretrained"


@pytest.fixture(scope="module")
def benches():
    threads, made = torch.get_num_threads(), BiasedBenches()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)
    made.close()


@pytest.mark.parametrize("form", [PLAIN, AUTO, FULL])
@pytest.mark.parametrize("export", EXPORTS)
def test_every_way_out(benches, export, form):
    if form not in EXPORTS[export].forms:
        pytest.skip(f"no {export} with {form}")
    result = run(Cell(export, form, "bert", "classification", "ia3" if form != FULL else ALONE), benches)
    is_without_rows = form == PLAIN and export in ("save_pretrained", "Trainer.save_model")
    assert result.status == (WARNED if is_without_rows else EQUAL), result.reason


@pytest.mark.parametrize(("model", "head"), [("bert", "masked"), ("gpt2", "causal"), ("t5", "seq2seq")])
def test_merged_adapters_of_language_models(benches, model, head):
    result = run(Cell(MERGE, PLAIN, model, head, "lora"), benches)
    assert result.status == EQUAL, result.reason


def test_rows_that_are_not_merged_are_wrong(benches, monkeypatch):
    monkeypatch.setattr(merged_rows, "merge_rows", lambda model, name: None)
    result = run(Cell(MERGE, PLAIN, "bert", "classification", ALONE), benches)
    assert result.status != EQUAL


RESULTS = [
    Result(Cell(MERGE, PLAIN, "bert", "masked", ALONE), WRONG, "off"),
    Result(Cell(MERGE, PLAIN, "bert", "masked", "lora"), EQUAL),
    Result(Cell(MERGE, AUTO, "bert", "masked", ALONE), ADAPTERS, "no"),
]
TABLE = f"""\
| bert, masked                    | kind of model    | pema alone   | lora  |
| ------------------------------- | ---------------- | ------------ | ----- |
| {MERGE} | plain class      | WRONG [1]    | equal |
| {MERGE} | AutoAdapterModel | adapters [2] |       |

[1] off\x20\x20
[2] no\x20\x20

3 cells: 1 equal, 1 WRONG, 1 adapters."""


def test_the_table():
    assert markdown(RESULTS) == TABLE


def test_full_fine_tuning_has_one_column():
    found = cells(["bert"], ["pema alone", "lora"], ["pema-merge"])
    assert [(each.form, each.method) for each in found if each.head == "masked"] == [
        (PLAIN, ALONE), (PLAIN, "lora"), (AUTO, ALONE), (AUTO, "lora"), (FULL, ALONE),
    ]  # fmt: skip
