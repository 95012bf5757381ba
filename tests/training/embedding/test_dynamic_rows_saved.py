"""Growing vocabularies on disk: fingerprint, merge, a second run, configs, and the end of growth."""

import json

import adapters
import pytest
import torch
from adapters import AdapterConfig

from pema_adapters import (
    PartialVocabulary,
    PEMAConfig,
    merge_checkpoint,
    restore_embeddings,
    save_delta,
    shrink_embeddings,
)
from pema_adapters.errors import SurgeryError, UnseenTokenError
from tests.models import MIXED, SEEN, V, assert_same, batch, matrix_of, outputs
from tests.training.embedding.test_dynamic_rows import (  # noqa: F401 - data: a fixture
    GROWS,
    MODELS,
    adapter_model,
    data,
    full_model,
    loop,
    table_of,
)
from tests.training.test_shrink import rows_of


def test_the_fingerprint_covers_every_added_row(case, data, tmp_path):  # noqa: F811
    grown, scanned = adapter_model(case), adapter_model(case, data)
    for model in (grown, scanned):
        loop(model, data)
    missing = set(table_of(scanned).token_ids.tolist()) - set(table_of(grown).token_ids.tolist())
    grown.train()(**batch([[*missing, 0]]))
    state, expected = grown.state_dict(), scanned.state_dict()
    for name in ("token_ids", "fingerprint"):
        assert torch.equal(state[f"bert.pema.adapters.task.{name}"], expected[f"bert.pema.adapters.task.{name}"])


@MODELS
def test_a_grown_table_can_be_merged(case, data, tmp_path, make):  # noqa: F811
    model = make(case)
    loop(model, data)
    if make is adapter_model:
        model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    else:
        save_delta(model, tmp_path / "run")
    report = merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "merged")
    assert report.rows_merged == len(table_of(model).token_ids)
    merged = case.auto_class.from_pretrained(tmp_path / "merged")
    if make is adapter_model:
        adapters.init(merged)
        merged.load_adapter(str(tmp_path / "merged" / "adapters" / "task"), set_active=True, use_safetensors=True)
        merged.load_head(str(tmp_path / "run"))
    assert_same(outputs(merged, MIXED), outputs(model, MIXED))


def test_a_second_run_continues_from_the_saved_first(case, data, tmp_path):  # noqa: F811
    first, other = adapter_model(case), data.map(lambda row: {"input_ids": row["input_ids"] + 20})
    loop(first, data)
    first.save_adapter(str(tmp_path), "task")
    again = case.with_adapters()
    again.load_adapter(str(tmp_path))
    with pytest.raises(
        SurgeryError, match=r"no vocabulary yet that could grow: call .*shrink_embeddings\(model, \"task\"\)"
    ):
        again.train_adapter("task")
    used = shrink_embeddings(again, "task")
    assert used.token_ids.tolist() == rows_of(first).token_ids.tolist()
    assert_same([rows_of(again).weight], [rows_of(first).weight])
    again.train_adapter("task")
    loop(again, other)
    assert len(rows_of(again)) > len(used)


def test_configs_are_saved_and_older_ones_can_be_read():
    saved = json.loads(json.dumps(GROWS.to_dict()))
    assert saved["vocabulary"] == "grow" and AdapterConfig.load(saved) == GROWS
    del saved["vocabulary"]
    assert AdapterConfig.load(saved).vocabulary is None


def test_growth_from_initial_data_with_errors_in_evaluation(case):
    model = case.with_adapters()
    model.add_adapter("task", config=PEMAConfig(vocabulary="grow", unseen="error"))
    assert set(shrink_embeddings(model, "task", PartialVocabulary([3, 5], V))) == {0, 3, 5}
    model.train_adapter("task")
    model.train()(**SEEN)
    outputs(model, SEEN)
    with pytest.raises(UnseenTokenError, match="4 token ids are outside the partial vocabulary"):
        outputs(model, MIXED)


def test_a_given_vocabulary_ends_growth_in_full_fine_tuning(case):
    model = full_model(case)
    shrink_embeddings(model, None, PartialVocabulary([3], V))
    model.train()(**SEEN)
    assert model.get_input_embeddings().token_ids.tolist() == [0, 3]
    restore_embeddings(model)
    assert matrix_of(model).shape[0] == V and type(model.get_input_embeddings()) is torch.nn.Embedding
