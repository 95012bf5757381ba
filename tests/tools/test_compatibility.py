"""PEMA beside the methods of adapters on its model types: a part of the matrix that tools/compatibility.py makes."""

import json
import sys

import pytest
import torch

from tests.paths import TOOLS

sys.path.append(str(TOOLS))

from compat.auto_cell import AutoBenches, AutoCell, auto_cells, run_auto
from compat.cell import NONE, OK, OURS, REFUSED, THEIRS, Benches, Cell, Result, run
from compat.matrix import auto_markdown, markdown
from compat.models import ALONE, FAMILIES, LM_HEADS, METHODS, UNUSED, V
from compatibility import Worker, _save_result, cells, render
from pema_adapters.merging.planning import planner
from pema_adapters.training.base.mapped_rows import MappedRows

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # what models say among themselves

MODELS = [
    "albert", "bart", "clip text", "deberta-v2", "distilbert", "gemma2", "gpt2", "mistral", "modernbert", "roberta",
    "t5", "whisper", "xmod",
]  # fmt: skip


@pytest.fixture(scope="module")
def benches():
    threads, made = torch.get_num_threads(), Benches()
    torch.set_num_threads(1)  # of such small models more would wait for each other
    yield made
    torch.set_num_threads(threads)
    made.close()


@pytest.mark.parametrize("method", ["compacter", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model(benches, model, method):
    result = run(Cell(model, method, "classification"), benches)
    assert result.status == OK, result.reason
    assert result.changed == (model == "xmod")  # adapters.init takes the language adapters away


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method(benches, method):
    result = run(Cell("bert", method, "classification"), benches)
    assert result.status == OK, result.reason


@pytest.mark.parametrize("model", ["bert", "encoder-decoder", "gpt2", "t5"])
def test_language_models(benches, model):
    (head,) = FAMILIES[model].heads
    assert head in LM_HEADS
    result = run(Cell(model, "compacter", head), benches)
    assert result.status == OK, result.reason


@pytest.fixture(scope="module")
def auto_benches(benches):
    return AutoBenches(benches.folder)


AUTO = [
    *(AutoCell("roberta", "lora", head) for head in ("classification", "multilabel", "tagging", "qa")),
    AutoCell("bert", "seq_bn_inv", "masked"),
    AutoCell("bert", "lora", "masked", "full"),
    AutoCell("albert", "compacter", "masked", "full"),
    AutoCell("distilbert", "pema alone", "masked", "grow", "lm"),
    AutoCell("gpt2", "lora", "causal", "full"),
    AutoCell("bert", "seq_bn_inv", "base", "full", "lm"),
    AutoCell("t5", "lora", "seq2seq"),
]


@pytest.mark.parametrize("cell", AUTO, ids=lambda cell: "-".join(vars(cell).values()))
def test_flexible_heads_loaded_as_printed(auto_benches, cell):
    result = run_auto(cell, auto_benches)
    assert result.status == OK, result.reason


def test_a_refusal_and_a_head_that_is_not_there(auto_benches):
    refused = run_auto(AutoCell("t5", "lora", "seq2seq", "full"), auto_benches)
    assert refused.status == REFUSED and "T5AdapterModel ties the embeddings of its encoder" in refused.reason
    assert run_auto(AutoCell("t5", "lora", "masked"), auto_benches).status == NONE


def test_a_merged_model_that_is_another_is_our_failure(auto_benches, monkeypatch):
    monkeypatch.setattr(planner, "place_output", lambda base, delta: (delta, []))
    result = run_auto(AutoCell("bert", "lora", "masked", "full"), auto_benches)
    assert result.status == OURS and "BertForMaskedLM is another function" in result.reason


def test_what_adapters_cannot_do_is_told_from_what_does_not_apply(benches):
    theirs = run(Cell("t5", "prompt_tuning", "classification"), benches)
    assert (theirs.status, theirs.reason) == (
        THEIRS,
        "ValueError: Adapter config or type is not supported by this model.",
    )
    assert run(Cell("vit", ALONE, "classification"), benches).status == NONE


def test_a_matrix_that_is_alive_is_our_failure(benches):
    held = torch.zeros(V, 3)
    result = run(Cell("bert", "lora", "classification"), benches)
    assert (result.status, result.reason) == (OURS, "1 tensors [V, d] are alive, expected 0"), held.shape


def test_rows_that_a_base_gives_wrongly_are_our_failure(benches, monkeypatch):
    read_rows, wrong = MappedRows.read_rows, torch.randn(128)
    monkeypatch.setattr(
        MappedRows, "read_rows", lambda base, ids: read_rows(base, ids) + (ids == UNUSED[0])[:, None] * wrong
    )
    result = run(Cell("bert", "lora", "classification"), benches)
    assert result.status == OURS and result.reason.endswith("(tokens outside the vocabulary)")


def test_a_process_that_dies_is_a_cell_that_fails():
    worker = Worker()
    worker._process.kill()
    assert worker.run(Cell("bert", "lora", "classification")) is None
    worker.stop()


def test_language_model_heads_are_tried_where_there_are_any():
    groups = cells(["bert", "vit"], ["lora"], ["classification", "masked", "causal"])
    assert [cell for group in groups for cell in group] == [
        Cell("vit", ALONE, "classification"), Cell("bert", "lora", "classification"), Cell("bert", "lora", "masked"),
    ]  # fmt: skip


def test_auto_cells_and_their_table():
    groups = auto_cells(("bert",), ("lora", "ia3"), ("qa", "masked"))
    counts = {(group[0].head, group[0].base): len(group) for group in groups}
    assert counts == {("qa", "bare"): 2, ("masked", "bare"): 6, ("masked", "lm"): 3, ("base", "lm"): 3}
    results = [
        Result(AutoCell("bert", "lora", "masked", "full"), OURS, "why"),
        Result(AutoCell("bert", "lora", "masked"), OK),
        Result(AutoCell("bert", "lora", "seq2seq"), NONE, "no head"),
    ]
    assert (
        auto_markdown(results)
        == """\
| head   | output | equal | refused | fails in adapters without PEMA, too | wrong |
| ------ | ------ | ----- | ------- | ----------------------------------- | ----- |
| masked | full   | 0     | 0       | 0                                   | 1     |
| masked | tied   | 1     | 0       | 0                                   | 0     |

1 x wrong: why\x20\x20

2 cells: 1 equal, 0 refused, 0 fails in adapters without PEMA, too, 1 wrong."""
    )


RESULTS = [
    Result(Cell("t5", "vera", "seq2seq"), OURS, "why"),
    *(Result(Cell(model, method, "classification"), OK) for model in ("gpt2", "bert") for method in ("lora", "ia3")),
    Result(Cell("bert", "vera", "classification"), OK),
    Result(Cell("gpt2", "vera", "classification"), THEIRS, "no"),
    Result(Cell("vit", ALONE, "classification"), NONE, "no text"),
]
TABLE = """\
| classification | lora, ia3 | vera  |
| -------------- | --------- | ----- |
| bert           | ✓         | ✓     |
| gpt2           | ✓         | – [1] |

| seq2seq | vera  |
| ------- | ----- |
| t5      | ✗ [2] |

[1] adapters without PEMA: no\x20\x20
[2] why\x20\x20
vit: no text\x20\x20

8 cells: 5 work, 1 fail in adapters without PEMA, too, 1 fail with PEMA only, 1 do not apply."""


def test_the_table():
    assert markdown(RESULTS) == TABLE


def test_a_result_file_gives_the_same_table():
    saved = {"cells": [_save_result(each) for each in RESULTS]}
    assert render(json.loads(json.dumps(saved))) == TABLE
