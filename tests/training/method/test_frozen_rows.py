"""Frozen rows, which only save memory, and rows in another dtype than the model's."""

import adapters
import pytest
import torch
from adapters import ConfigUnion, LoRAConfig
from transformers import AutoModelForSequenceClassification

from pema_adapters import PartialVocabulary, PEMAConfig, merge_checkpoint, restore_embeddings, shrink_embeddings
from pema_adapters.errors import MergeError
from tests.models import MIXED, SEEN, USED, V, live_tensors_of_shape, matrix_of, outputs
from tests.training.test_shrink import COMPACTER, perturb


def prepared(model, *configs):
    adapters.init(model)
    model.add_adapter("task", config=ConfigUnion(*configs) if len(configs) > 1 else configs[0])
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    return model


def step(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        model(**SEEN, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one, other):
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("config", [LoRAConfig(r=2), COMPACTER], ids=["lora", "compacter"])
def test_frozen_rows_do_not_change(case, tmp_path, config):
    model = prepared(case.plain(), PEMAConfig(trainable=False), config)
    rows = model.base_model.pema.adapters["task"]
    assert len(rows) and not rows.weight.requires_grad and not live_tensors_of_shape((V, 32))
    before = rows.weight.clone()
    step(model)
    assert torch.equal(rows.weight, before)
    after = outputs(model, MIXED)
    assert not any(".pema." in name for name in model.state_dict())
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    for shrunk_again in (False, True):
        again = case.with_adapters()
        again.load_adapter(str(tmp_path / "run"), set_active=True, use_safetensors=True)
        if shrunk_again:
            shrink_embeddings(again, "task", PartialVocabulary(USED, V))
        same(outputs(again, MIXED), after)
    again.train_adapter("task")
    step(again)
    restore_embeddings(model)
    same(outputs(model, MIXED), after)
    if config is COMPACTER:
        with pytest.raises(MergeError, match="nothing to merge: load it with load_adapter on the base"):
            merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "merged")
        return
    merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(matrix_of(merged), matrix_of(case.plain()))
    same(outputs(merged, MIXED), after)


def test_an_adapter_with_frozen_rows_only_has_nothing_to_merge(case, tmp_path):
    model = case.plain()
    adapters.init(model)
    model.add_adapter("task", config=PEMAConfig(trainable=False))
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    same(outputs(model, MIXED), outputs(case.plain(), MIXED))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    with pytest.raises(MergeError, match="nothing to merge"):
        merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "merged")


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_rows_of_another_dtype(case, tmp_path, base):
    case.plain().to(base).save_pretrained(tmp_path / "half")
    load = AutoModelForSequenceClassification.from_pretrained
    model = prepared(load(tmp_path / "half", dtype=base), PEMAConfig(dtype="float32"))
    rows = model.base_model.pema.adapters["task"]
    assert rows.weight.dtype == torch.float32 and model.get_input_embeddings()(MIXED["input_ids"]).dtype == base
    same(outputs(model, MIXED), outputs(load(tmp_path / "half", dtype=base), MIXED))
    perturb(model)
    after = outputs(model, MIXED)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    again = load(tmp_path / "half", dtype=base)
    adapters.init(again)
    again.load_adapter(str(tmp_path / "run"), set_active=True, use_safetensors=True)
    assert again.base_model.pema.adapters["task"].weight.dtype == torch.float32
    same(outputs(again, MIXED), after)
    report = merge_checkpoint(tmp_path / "half", tmp_path / "run", tmp_path / "merged")
    assert 0 < report.max_rounding_error < 0.1 and any("F32 weights were cast" in note for note in report.notes)
    same(outputs(load(tmp_path / "merged", dtype=base), MIXED), after)


@pytest.mark.parametrize(("name", "value"), [("output_embeddings", "both"), ("trainable", None), ("dtype", "float64")])
def test_wrong_config_values_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"PEMAConfig: {name} is {value!r}, expected"):
        PEMAConfig(**{name: value})
