"""A flexible head in a merge: the head of an ordinary class where one computes the same, else kept for load_head."""

import json

import adapters
import pytest
import torch
from adapters import AutoAdapterModel, ConfigUnion, LoRAConfig, SeqBnConfig
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import pema_adapters
from pema_adapters import merge_checkpoint
from tests.models import CONFIGS, USED

INPUTS = {"input_ids": torch.tensor([USED[:5], USED[4:]]), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
HEADS = {
    "classification": (AutoModelForSequenceClassification, lambda m: m.add_classification_head("task", num_labels=3)),
    "multilabel": (
        AutoModelForSequenceClassification,
        lambda m: m.add_classification_head("task", num_labels=4, multilabel=True),
    ),
    "regression": (AutoModelForSequenceClassification, lambda m: m.add_classification_head("task", num_labels=1)),
    "tagging": (AutoModelForTokenClassification, lambda m: m.add_tagging_head("task", num_labels=5)),
    "qa": (AutoModelForQuestionAnswering, lambda m: m.add_qa_head("task")),
}


def trained(tmp_path, family, add_head, config):
    torch.manual_seed(3)
    AutoAdapterModel.from_config(CONFIGS[family]()).save_pretrained(tmp_path / "base")
    model = AutoAdapterModel.from_pretrained(tmp_path / "base")
    model.add_adapter("task", config=config)
    add_head(model)
    pema_adapters.shrink_embeddings(model, "task", [{"input_ids": USED}])
    model.train_adapter("task")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True, with_head=True)
    return model.eval()


def outputs(model):
    with torch.no_grad():
        made = model.eval()(**INPUTS)
    return torch.stack([made.start_logits, made.end_logits]) if "start_logits" in made else made.logits


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
def test_it_becomes_the_head_of_a_class(tmp_path, family, head):
    auto_class, add_head = HEADS[head]
    model = trained(tmp_path, family, add_head, ConfigUnion(pema_adapters.PEMAConfig(), LoRAConfig()))
    report = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    assert report.adapters_left == ()
    merged, info = auto_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["architectures"] == [type(merged).__name__]
    problems = {"multilabel": "multi_label_classification", "regression": "regression"}
    assert config.get("problem_type") == problems.get(head)


def test_it_stays_where_no_class_is_the_same(tmp_path):
    model = trained(
        tmp_path, "bert", HEADS["classification"][1], ConfigUnion(pema_adapters.PEMAConfig(), SeqBnConfig())
    )
    report = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    assert any(
        "its flexible head stays in adapters/task" in note and "BertForSequence" in note for note in report.notes
    )
    merged = AutoAdapterModel.from_pretrained(tmp_path / "out")
    merged.load_adapter(str(tmp_path / "out" / "adapters" / "task"), set_active=True, use_safetensors=True)
    adapters.init(merged)
    torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-5, atol=1e-5)
