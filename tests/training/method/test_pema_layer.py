"""PEMA as a method of adapters: configs, summary, delete, average, freeze, save and load."""

import json
import subprocess
import sys
import textwrap

import adapters
import pytest
import torch
from adapters import AdapterConfig, AutoAdapterModel, CompacterConfig, ConfigUnion, LoRAConfig, ModelAdaptersConfig
from transformers import AutoModel, AutoModelForSequenceClassification, ModernBertConfig

from pema_adapters import PartialVocabulary, PEMAConfig, shrink_embeddings
from pema_adapters.errors import SurgeryError
from tests.models import CONFIGS, MIXED, SEEN, USED, V, assert_same, matrix_of, outputs, with_rows
from tests.training.test_shrink import COMPACTER, perturb, rows_of, shrunk

BOTH = ConfigUnion(PEMAConfig(unseen="error"), COMPACTER)


def run_python(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("first", ["adapters", "pema_adapters"])
@pytest.mark.slow
def test_either_import_order_makes_it_a_method(first):
    second = "adapters" if first == "pema_adapters" else "pema_adapters"
    done = run_python(f"""
        import sys, {first}
        if "{first}" == "pema_adapters":
            assert "torch" not in sys.modules and "adapters" not in sys.modules
        import {second}
        from adapters import ADAPTER_CONFIG_MAP, AdapterConfig
        assert type(ADAPTER_CONFIG_MAP["pema"]).__name__ == "PEMAConfig"
        assert AdapterConfig.load("pema[unseen='error']|lora[r=2]")["0.unseen"] == "error"
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("config", [PEMAConfig(), PEMAConfig(unseen="error"), BOTH])
def test_configs_survive_json(config):
    again = AdapterConfig.load(json.loads(json.dumps(config.to_dict())))
    assert again == config
    setups = ModelAdaptersConfig()
    setups.add("task", config)
    restored = ModelAdaptersConfig(**json.loads(json.dumps(setups.to_dict())))
    assert restored.match("task", PEMAConfig)["unseen"] == setups.match("task", PEMAConfig)["unseen"]


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match='unseen is \'skip\', expected "base" or "error"'):
        PEMAConfig(unseen="skip")


def test_summary_counts_the_rows(case):
    model = shrunk(case, ConfigUnion(PEMAConfig(), COMPACTER))
    row = model.adapter_summary(as_dict=True)[0]
    compacter = case.with_adapters()
    compacter.add_adapter("task", config=COMPACTER)
    alone = compacter.adapter_summary(as_dict=True)[0]["#param"]
    assert row["#param"] == alone + rows_of(model).weight.numel()
    assert row["active"] and row["architecture"] == "union"
    assert "task" in model.adapter_summary()


def test_the_summary_counts_the_full_matrix(case):
    full, model = case.with_adapters(), shrunk(case)
    assert model.adapter_summary(as_dict=True)[-1]["#param"] == full.adapter_summary(as_dict=True)[-1]["#param"]


def test_delete_freeze_and_move(case):
    model = shrunk(case)
    model.train_adapter("task")
    assert rows_of(model).weight.requires_grad
    assert not matrix_of(model).requires_grad
    model.adapter_to("task", dtype=torch.float64)
    assert rows_of(model).weight.dtype == torch.float64
    model.delete_adapter("task")
    assert "task" not in model.base_model.pema.adapters
    assert_same(outputs(model, MIXED), outputs(case.with_adapters(), MIXED))


def two_adapters(case):
    model = shrunk(case, ConfigUnion(PEMAConfig(), COMPACTER), PartialVocabulary([3, 5, 8], V))
    model.add_adapter("other", config=ConfigUnion(PEMAConfig(), COMPACTER))
    shrink_embeddings(model, "other", PartialVocabulary([5, 99], V))
    perturb(model), perturb(model, "other")
    return model


def test_average_is_over_the_union_with_base_rows_where_one_has_none(case):
    model = two_adapters(case)
    model.average_adapter("mean", ["task", "other"], weights=[0.25, 0.75])
    base = matrix_of(case.plain()).detach()
    expected = torch.zeros_like(base)
    for name, share in (("task", 0.25), ("other", 0.75)):
        full = base.clone()
        full[rows_of(model, name).token_ids.long()] = rows_of(model, name).weight.detach()
        expected += share * full
    mean = rows_of(model, "mean")
    assert mean.token_ids.tolist() == [0, 3, 5, 8, 99]
    torch.testing.assert_close(mean.weight.detach(), expected[mean.token_ids.long()])
    model.set_active_adapters("mean")
    outputs(model, MIXED)


@pytest.mark.parametrize("names", [["task", "empty"], ["empty", "task"]])
def test_average_with_an_adapter_without_a_vocabulary(case, names):
    model = shrunk(case)
    model.add_adapter("empty", config=PEMAConfig())
    perturb(model)
    model.average_adapter("mean", names, weights=[0.5, 0.5])
    task, mean = rows_of(model), rows_of(model, "mean")
    base = matrix_of(case.plain()).detach()[task.token_ids.long()]
    assert mean.token_ids.tolist() == task.token_ids.tolist()
    torch.testing.assert_close(mean.weight.detach(), 0.5 * base + 0.5 * task.weight.detach())


def test_average_of_adapters_without_a_vocabulary_has_none(case):
    model = shrunk(case)
    for name in ("one", "two"):
        model.add_adapter(name, config=PEMAConfig())
    model.average_adapter("mean", ["one", "two"])
    assert len(rows_of(model, "mean")) == 0


def test_average_refuses_other_strategies(case):
    model = shrunk(case)
    with pytest.raises(ValueError, match="cannot average PEMA rows"):
        model.average_adapter("mean", ["task"], combine_strategy="lora_linear_only_negate_b")
    assert "mean" not in model.adapters_config


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("target", ["full", "shrunk"])
def test_save_and_load(case, tmp_path, safe, target):
    model = shrunk(case, ConfigUnion(PEMAConfig(), COMPACTER))
    perturb(model)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=safe)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert ("adapter.safetensors" if safe else "pytorch_adapter.bin") in files
    again = case.with_adapters()
    if target == "shrunk":
        again.add_adapter("first", config="pema")
        shrink_embeddings(again, "first", PartialVocabulary([2], V))
    again.load_adapter(str(tmp_path / "run"), set_active=True, use_safetensors=safe)
    assert_same(outputs(again, MIXED), outputs(model, MIXED))
    if target == "full":
        assert matrix_of(again).shape[0] == V
        used = shrink_embeddings(again, "task", PartialVocabulary([99], V))
        assert 99 in used and 3 in used
        assert_same(outputs(again, MIXED), outputs(model, MIXED))


def test_training_continues_after_loading_under_another_name(case, tmp_path):
    model = shrunk(case)
    perturb(model)
    model.save_adapter(str(tmp_path / "run"), "task")
    again = case.with_adapters()
    again.load_adapter(str(tmp_path / "run"), load_as="mine", set_active=True)
    again.train_adapter("mine")
    again(**SEEN).logits.sum().backward()
    assert rows_of(again, "mine").weight.grad is not None
    assert_same(outputs(again, MIXED), outputs(model, MIXED))


def test_loading_rows_keeps_the_parameter(case, tmp_path):
    model = shrunk(case)
    model.save_adapter(str(tmp_path / "run"), "task")
    parameter = rows_of(model).weight
    kept = parameter.detach().clone()
    perturb(model)
    model.load_adapter(str(tmp_path / "run"))
    assert rows_of(model).weight is parameter
    assert_same([parameter], [kept])


def test_rows_of_a_larger_vocabulary_are_refused(case, make_case, tmp_path):
    model = shrunk(case)
    model.save_adapter(str(tmp_path / "run"), "task")
    small = case.with_adapters()
    small.resize_token_embeddings(50)
    with pytest.raises(SurgeryError, match="do not fit the model's 50 embedding rows"):
        small.load_adapter(str(tmp_path / "run"))


def test_rows_of_another_base_are_used_with_a_warning(case, make_case, tmp_path, caplog):
    model = shrunk(case)
    model.save_adapter(str(tmp_path / "run"), "task")
    same = case.with_adapters()
    same.load_adapter(str(tmp_path / "run"), set_active=True)
    outputs(same, MIXED)
    assert "another base" not in caplog.text
    torch.manual_seed(99)
    other = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())
    adapters.init(other)
    other.load_adapter(str(tmp_path / "run"), set_active=True)
    outputs(other, MIXED)
    assert "adapter 'task' was trained on another base" in caplog.text


def test_auto_adapter_model_with_a_flexible_head(case, tmp_path):
    model = AutoAdapterModel.from_pretrained(case.folder)
    model.add_classification_head("task", num_labels=3)
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), LoRAConfig(r=2)))
    before = outputs(model, MIXED)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    assert_same(outputs(model, MIXED), before)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    again = AutoAdapterModel.from_pretrained(case.folder)
    again.load_adapter(str(tmp_path / "run"), set_active=True, use_safetensors=True)
    assert_same(outputs(again, MIXED), outputs(model, MIXED))


def test_save_pretrained_and_from_pretrained_bring_the_adapter_back(case, tmp_path):
    model = AutoAdapterModel.from_pretrained(case.folder)
    model.add_classification_head("task", num_labels=3)
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), LoRAConfig(r=2)), set_active=True)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    perturb(model)
    model.save_pretrained(tmp_path / "whole")
    again = AutoAdapterModel.from_pretrained(tmp_path / "whole")
    again.set_active_adapters("task")
    for left, right in zip(outputs(again, MIXED), outputs(model, MIXED), strict=True):
        torch.testing.assert_close(left, right)
    assert_same([rows_of(again).weight, matrix_of(again)], [rows_of(model).weight, matrix_of(case.plain())])


def test_interface_models_accept_pema_without_listing_it(tmp_path):
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, reference_compile=False,
        embedding_dropout=0.0, norm_bias=True, attention_bias=True, attn_implementation="eager",
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", attn_implementation="eager")
    adapters.init(model)
    before = outputs(model, MIXED)
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), LoRAConfig(r=2)), set_active=True)
    assert model.supports_adapter("pema")
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    assert_same(outputs(model, MIXED), before)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    assert "pema" not in (tmp_path / "run" / "adapter_interface.json").read_text()


def test_a_model_without_a_token_embedding_is_refused():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
    )
    adapters.init(model)
    with pytest.raises(SurgeryError, match="has no token embedding"):
        model.add_adapter("task", config="pema")
    assert "task" not in model.adapters_config


def test_training_without_a_vocabulary_is_refused_in_forward_too(case):
    model = case.with_adapters()
    model.add_adapter("task", config="pema", set_active=True)
    assert_same(outputs(model, MIXED), outputs(case.with_adapters(), MIXED))
    model.train()
    with pytest.raises(SurgeryError, match="has PEMA but no vocabulary yet"):
        model(**SEEN)


def test_a_headless_model_is_its_own_base(case, tmp_path):
    model = AutoModel.from_pretrained(case.folder)
    adapters.init(model)
    full = AutoModel.from_pretrained(case.folder)
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), CompacterConfig(reduction_factor=4, phm_dim=2)))
    model.set_active_adapters("task")
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    perturb(model)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    table = rows_of(model)
    oracle = with_rows(full, table.token_ids, table.weight)
    torch.testing.assert_close(
        model.get_input_embeddings()(MIXED["input_ids"]), oracle.get_input_embeddings()(MIXED["input_ids"])
    )
