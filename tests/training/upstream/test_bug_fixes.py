"""Bugs of adapters in saving, loading and wrapping that `bug_fixes` fixes."""

import json
import logging

import adapters
import pytest
import torch
from adapters import AdapterConfig, CompacterConfig, ConfigUnion, LoRAConfig, ModelAdaptersConfig, SeqBnInvConfig
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DebertaConfig,
    ModernBertConfig,
    T5Config,
)  # fmt: skip

from pema_adapters import PartialVocabulary, PEMAConfig, restore_embeddings, shrink_embeddings
from pema_adapters.training.upstream.bug_fixes import drop_shared_tensors
from tests.models import CONFIGS, MIXED, USED, V, assert_same, bert_like, outputs

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")  # T5 with adapters

SHARED = {"compacter": CompacterConfig(reduction_factor=4, phm_dim=2), "vera": adapters.VeraConfig(r=2)}
T5 = {"vocab_size": V, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}


def checkpoint(folder, auto_class, config):
    torch.manual_seed(3)
    auto_class.from_config(config).save_pretrained(folder)

    def load():
        torch.manual_seed(7)
        model = auto_class.from_pretrained(folder)
        adapters.init(model)
        return model

    return load


def t5(auto_class, folder, **changes):
    return checkpoint(folder, auto_class, T5Config(**T5, decoder_start_token_id=0, **changes))


def bert(auto_class, folder):
    return checkpoint(folder, auto_class, CONFIGS["bert"]())


OWN_BASES = {
    "t5": lambda folder: t5(AutoModelForSeq2SeqLM, folder, tie_word_embeddings=False),
    "headless bert": lambda folder: bert(AutoModel, folder),
}


def with_adapter(model, config, name="task"):
    """Add an adapter with random weights, shared ones included."""
    model.add_adapter(name, config=config, set_active=True)
    if "pema" in json.dumps(config.to_dict()):
        shrink_embeddings(model, name, PartialVocabulary(USED, V))
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in (each for key, each in model.named_parameters() if f".{name}." in f".{key}"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs_for(model):
    return {**MIXED, "decoder_input_ids": MIXED["input_ids"]} if model.config.is_encoder_decoder else MIXED


def first(model):
    return outputs(model, inputs_for(model))[:1]


@pytest.mark.parametrize("pema", [True, False])
@pytest.mark.parametrize("method", SHARED)
@pytest.mark.parametrize("base", OWN_BASES)
def test_shared_weights_are_saved_on_models_that_are_their_own_base(tmp_path, base, method, pema):
    load = OWN_BASES[base](tmp_path / "base")
    config = ConfigUnion(PEMAConfig(), SHARED[method]) if pema else SHARED[method]
    model = with_adapter(load(), config)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    assert any(name.startswith("shared_parameters.task.") for name in load_file(tmp_path / "run/adapter.safetensors"))
    torch.manual_seed(99)
    again = load()
    again.load_adapter(str(tmp_path / "run"), load_as="mine", set_active=True, use_safetensors=True)
    assert_same(first(again), first(model))


def test_prompt_tuning_can_be_loaded_under_another_name(tmp_path):
    load = bert(AutoModelForSequenceClassification, tmp_path / "base")
    model = with_adapter(load(), adapters.PromptTuningConfig(prompt_length=3))
    model.save_adapter(str(tmp_path / "run"), "task")
    again = load()
    again.load_adapter(str(tmp_path / "run"), load_as="mine", set_active=True)
    assert_same(first(again), first(model))


def test_prefix_tuning_is_saved_once_as_safetensors(tmp_path):
    load = bert(AutoModelForSequenceClassification, tmp_path / "base")
    model = with_adapter(load(), ConfigUnion(PEMAConfig(), adapters.PrefixTuningConfig(bottleneck_size=8)))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    names = [name for name in load_file(tmp_path / "run/adapter.safetensors") if "prefix_tunings" in name]
    assert len(names) == len({name.split("prefix_tunings")[1] for name in names})
    again = load()
    again.load_adapter(str(tmp_path / "run"), set_active=True, use_safetensors=True)
    assert_same(first(again), first(model))


def test_the_tied_bias_of_a_masked_language_model_is_saved_as_safetensors(tmp_path):
    load = bert(AutoModelForMaskedLM, tmp_path / "base")
    model = with_adapter(load(), CompacterConfig(reduction_factor=4, phm_dim=2))
    with torch.no_grad():
        model.cls.predictions.bias.add_(1.0)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    head = load_file(tmp_path / "run" / "model_head.safetensors")
    assert "cls.predictions.bias" in head and "cls.predictions.decoder.bias" not in head
    again = load()
    again.load_adapter(str(tmp_path / "run"), set_active=True, use_safetensors=True)
    assert_same(first(again), first(model))


def test_shared_tensors_are_dropped_or_cloned():
    whole, empty = torch.arange(6.0).view(2, 3), torch.empty(0)
    given = {
        "whole": whole,
        "same": whole.view(2, 3),
        "part": whole[1:],
        "other": whole.clone(),
        "e": empty,
        "f": empty,
    }
    found = drop_shared_tensors(given)
    assert list(found) == ["whole", "part", "other", "e", "f"]
    assert found["whole"] is whole
    assert torch.equal(found["part"], whole[1:]) and found["part"].data_ptr() != whole[1:].data_ptr()


def test_the_saved_head_of_a_t5_classifier_has_no_base_weights(tmp_path):
    load = t5(AutoModelForSequenceClassification, tmp_path / "base")
    model = with_adapter(load(), ConfigUnion(PEMAConfig(), LoRAConfig(r=2)))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    head = load_file(tmp_path / "run" / "model_head.safetensors")
    assert set(head) == {name for name in model.state_dict() if name.startswith("classification_head.")}


def test_the_saved_head_of_t5_has_no_adapter_weights(tmp_path):
    load = t5(AutoModelForSeq2SeqLM, tmp_path / "base", tie_word_embeddings=False)
    model = with_adapter(load(), ConfigUnion(PEMAConfig(), SeqBnInvConfig(reduction_factor=4)))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    assert set(load_file(tmp_path / "run" / "model_head.safetensors")) == {"lm_head.weight"}


MERGED_PROJECTIONS = {
    "deberta": lambda: bert_like(DebertaConfig, pooler_hidden_size=32),
    "modernbert": lambda: ModernBertConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, reference_compile=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MERGED_PROJECTIONS)
def test_a_fused_projection_without_bias_stays_without(family):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(MERGED_PROJECTIONS[family]())
    before = outputs(model, MIXED)
    adapters.init(model)
    assert_same(outputs(model, MIXED), before)


def test_a_direft_config_survives_saving():
    config = adapters.DiReftConfig()
    assert AdapterConfig.load(json.loads(json.dumps(config.to_dict()))).subtract_projection is False
    setups = ModelAdaptersConfig()
    setups.add("no", adapters.NoReftConfig())
    setups.add("di", ConfigUnion(PEMAConfig(), config))
    again = ModelAdaptersConfig(**json.loads(json.dumps(setups.to_dict())))
    reft = adapters.configuration.adapter_config.ReftConfig
    assert again.match("di", reft).subtract_projection is False
    assert again.match("no", reft).subtract_projection is True
    assert "subtract_projection" not in adapters.NoReftConfig().to_dict()


@pytest.mark.parametrize("save", ["save_pretrained", "save_adapter"])
def test_adapters_can_be_deleted_after_saving(tmp_path, save):
    load = bert(AutoModelForSequenceClassification, tmp_path / "base")
    model = with_adapter(load(), ConfigUnion(PEMAConfig(), adapters.PrefixTuningConfig(bottleneck_size=8)))
    model.add_adapter("other", config=adapters.PrefixTuningConfig(bottleneck_size=8))
    before = first(model)
    model.save_pretrained(tmp_path / "out") if save == "save_pretrained" else model.save_adapter(
        str(tmp_path / "out"), "task"
    )
    assert_same(first(model), before)
    restore_embeddings(model)
    assert_same(first(model), before)
    model.delete_adapter("other")
    assert list(model.adapters_config.adapters) == ["task"]
    model.delete_adapter("task")


def test_activating_an_adapter_does_not_warn(case, caplog, monkeypatch):
    """Without the fix, adapters warns of a forward without an active adapter whenever one is activated."""
    model = case.with_adapters()
    model.add_adapter("task", config=PEMAConfig())
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    logger = logging.getLogger("adapters.model_mixin")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # independent of parent loggers that other tests changed
    with caplog.at_level(logging.WARNING, logger=logger.name):
        model.set_active_adapters("task")
        assert "none are activated" not in caplog.text
        model.set_active_adapters(None)
        outputs(model, MIXED)
    assert "none are activated" in caplog.text
