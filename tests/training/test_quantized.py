"""Quantised bases (bitsandbytes, on the CPU): rows train in full precision and merge into the original."""

import adapters
import pytest
import torch
from adapters import ConfigUnion, LoRAConfig
from transformers import AutoModelForSequenceClassification, BertConfig, BitsAndBytesConfig

from pema_adapters import PartialVocabulary, PEMAConfig, merge_checkpoint, shrink_embeddings
from pema_adapters.errors import FormatError
from tests.models import MIXED, USED, V, live_tensors_of_shape, matrix_of, outputs
from tests.training.method.test_frozen_rows import step

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WIDTH = 64  # a whole block of bitsandbytes
load = AutoModelForSequenceClassification.from_pretrained


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * WIDTH
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantized(base, **how):
    return load(base, quantization_config=BitsAndBytesConfig(**how), device_map="cpu", dtype=torch.float32)


@pytest.mark.parametrize(("how", "tolerance"), [({"load_in_8bit": True}, 0), ({"load_in_4bit": True}, 1e-3)])
def test_outputs_equal_those_of_the_quantized_model(base, how, tolerance):
    """On the CPU, 4-bit layers compute in another order once anybody has asked the model for its state."""
    model = quantized(base, **how)
    adapters.init(model)  # replaces the quantised layers by its own
    before = outputs(model, MIXED)
    model.add_adapter("task", config=PEMAConfig())
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.set_active_adapters("task")
    assert not live_tensors_of_shape((V, WIDTH))
    for one, other in zip(outputs(model, MIXED), before, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_training_and_merging(base, tmp_path, caplog):
    """4-bit layers cannot train beside adapters on a CPU (bitsandbytes adds the bias in place), with or without PEMA."""
    model = quantized(base, load_in_8bit=True)
    adapters.init(model)
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), LoRAConfig(r=2)))
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    assert "newly initialized" not in caplog.text
    model.train_adapter("task")
    step(model)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    merge_checkpoint(base, tmp_path / "run", tmp_path / "merged", verify=True)
    merged = load(tmp_path / "merged")
    rows = model.bert.pema.adapters["task"]
    assert torch.equal(matrix_of(merged)[rows.token_ids.long()], rows.weight)
    for one, other in zip(outputs(merged, MIXED), outputs(model, MIXED), strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)  # 8-bit weights


@pytest.mark.parametrize(("skipped", "dtype"), [(None, "U8"), (["classifier"], "F32")])
def test_a_quantized_tied_head_is_refused(base, tmp_path, skipped, dtype):
    """A list of modules to skip replaces Transformers' default, which contains the head."""
    model = quantized(base, load_in_4bit=True, llm_int8_skip_modules=skipped or ["pooler"])
    adapters.init(model)
    model.add_adapter("task", config=PEMAConfig())
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    if dtype == "F32":
        merge_checkpoint(base, tmp_path / "run", tmp_path / "merged", verify=True)
        return
    way_out = r'train with BitsAndBytesConfig\(..., llm_int8_skip_modules=\["classifier"\]\)'
    with pytest.raises(FormatError, match=rf"tensor 'classifier.weight' is U8: the head was quantized .*; {way_out}"):
        merge_checkpoint(base, tmp_path / "run", tmp_path / "merged")
