"""memory_report equals the tensors of a real model after a step of AdamW."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)  # fmt: skip

from pema_adapters import PartialVocabulary, load_model, memory_report
from pema_adapters.analysis.memory_report import Memory
from pema_adapters.errors import FormatError, SurgeryError, VocabularyError
from pema_adapters.training.output.tied_head import PartialOutput
from tests.models import SMALL, V, bert_like
from tests.paths import REPOSITORY

D = SMALL["hidden_size"]
IDS = [3, 5, 8, 13, 118]
VOCABULARY = PartialVocabulary(IDS, V)
GPT = {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 40, "bos_token_id": 7, "eos_token_id": 7}
LLAMA = {**SMALL, "vocab_size": V, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2}
DISTIL = {"vocab_size": V, "dim": D, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40}

MODELS = {  # class, config, is the head tied
    "bert": (AutoModel, lambda: bert_like(BertConfig), False),
    "classification": (AutoModelForSequenceClassification, lambda: bert_like(BertConfig), False),
    "sinusoids are frozen": (AutoModel, lambda: DistilBertConfig(**DISTIL, sinusoidal_pos_embds=True), False),
    "masked": (AutoModelForMaskedLM, lambda: bert_like(BertConfig), True),
    "gpt2": (AutoModelForCausalLM, lambda: GPT2Config(**GPT), True),
    "llama": (AutoModelForCausalLM, lambda: LlamaConfig(**LLAMA), False),
    "t5": (AutoModelForSeq2SeqLM, lambda: T5Config(**T5), True),
    "t5, untied": (AutoModelForSeq2SeqLM, lambda: T5Config(**T5, tie_word_embeddings=False), False),
}


def measure(model):
    """Measure parameters, gradients and states after a step of AdamW; a matrix that a tied head holds counts."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    held = [head._held for head in model.modules() if isinstance(head, PartialOutput) and head._held is not None]
    weights = [*model.parameters(), *held]
    states = [value for state in optimizer.state.values() for value in state.values()]
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return Memory(*(sum(tensor.nbytes for tensor in tensors) for tensors in (weights, grads, states)))


@pytest.fixture
def saved(tmp_path):
    def save(kind):
        model_class, config, is_tied = MODELS[kind]
        torch.manual_seed(0)
        model_class.from_config(config()).save_pretrained(tmp_path)
        return model_class, str(tmp_path), is_tied

    return save


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw_fp32", torch.float32), ("adamw_bf16", torch.bfloat16)])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("storage", ["disk", "device"])
def test_reports_equal_the_tensors_of_real_models(kind, optimizer, dtype, storage, saved):
    model_class, folder, is_tied = saved(kind)
    full = model_class.from_pretrained(folder, dtype=dtype)
    partial = load_model(model_class, folder, VOCABULARY, dtype=dtype, output_storage=storage)
    ids = torch.tensor([[3, 5]])
    partial(input_ids=ids, **({"decoder_input_ids": ids} if partial.config.is_encoder_decoder else {}))
    before, after = measure(full), measure(partial)
    for given in (folder, Path(folder), full, full.config, partial):
        report = memory_report(given, VOCABULARY, optimizer, model_class=model_class, output_storage=storage)
        assert (report.before, report.after) == (before, after)
        assert report.saved == before - after
        assert report.has_tied_head == is_tied
        assert report.parameters == full.num_parameters()
        assert report.partial_vocab_size == len(partial.get_input_embeddings().weight)


def test_bytes_by_hand():
    """A matrix of 120 x 32, of which five ids and the pad id are used."""
    report = memory_report(bert_like(BertConfig), VOCABULARY, "adamw_8bit")
    assert (report.vocab_size, report.partial_vocab_size, report.embedding_dim) == (120, 6, 32)
    assert report.embedding_rows_saved == 114
    assert report.parameters_saved == report.trained_parameters_saved == 114 * 32
    assert report.saved == Memory(weights=4 * 114 * 32, gradients=4 * 114 * 32, optimizer_states=2 * 114 * 32)
    assert report.saved.total == 10 * 114 * 32


def test_a_tied_head_holds_the_matrix_on_a_device_alone():
    config = GPT2Config(**GPT, architectures=["GPT2LMHeadModel"])
    report = memory_report(config, VOCABULARY)
    assert (report.built, report.has_tied_head, report.partial_vocab_size) == ("GPT2LMHeadModel", True, 6)
    assert (report.parameters_saved, report.trained_parameters_saved) == (114 * 32, 114 * 32)
    assert report.saved == Memory(weights=4 * 114 * 32, gradients=4 * 114 * 32, optimizer_states=8 * 114 * 32)
    assert report.logits_per_token == 2 * 120 * 4
    report = memory_report(config, VOCABULARY, output_storage="device")
    assert (report.parameters_saved, report.trained_parameters_saved) == (-6 * 32, 114 * 32)
    assert report.saved == Memory(weights=-4 * 6 * 32, gradients=4 * 114 * 32, optimizer_states=8 * 114 * 32)


@pytest.mark.parametrize(
    ("config", "built"),
    [
        (bert_like(BertConfig, architectures=["BertForMaskedLM"]), "BertModel"),
        (bert_like(BertConfig), "BertModel"),
        (T5Config(**T5, architectures=["T5ForConditionalGeneration"]), "T5ForConditionalGeneration"),
        (LlamaConfig(**LLAMA, architectures=["OfAnotherLibraryForCausalLM"]), "LlamaModel"),
    ],
)
def test_the_class_follows_the_architecture(config, built):
    assert memory_report(config, VOCABULARY).built == built


def test_a_frozen_embedding_saves_only_weights():
    model = AutoModel.from_config(bert_like(BertConfig))
    model.get_input_embeddings().weight.requires_grad_(False)
    assert memory_report(model, VOCABULARY).saved == Memory(weights=4 * 114 * 32, gradients=0, optimizer_states=0)


def test_data_are_scanned_for_a_vocabulary():
    rows = [{"input_ids": IDS, "labels": [90]}]
    assert memory_report(bert_like(BertConfig), rows).partial_vocab_size == 6
    generates = GPT2Config(**GPT, architectures=["GPT2LMHeadModel"])
    assert memory_report(generates, rows).partial_vocab_size == 7  # its labels are scanned, too


def test_str_is_a_table():
    report = memory_report(BertConfig(vocab_size=1_000, hidden_size=12), PartialVocabulary([1, 2], 1_000))
    lines = str(report).splitlines()
    assert "(BertModel), adamw_fp32: 3 of 1,000 rows of 12, 11,964 of " in lines[0]
    assert [line.split("  ")[0].strip() for line in lines[2:]] == ["weights", "gradients", "optimizer states", "total"]
    assert lines[-1].endswith(f"{report.saved.total / 1e6:,.1f} MB")
    assert repr(report).startswith("MemoryReport(model=")


def test_to_dict_is_json_ready():
    report = memory_report(bert_like(BertConfig), VOCABULARY)
    read = json.loads(json.dumps(report.to_dict()))
    assert read["saved"] == {"weights": 14592, "gradients": 14592, "optimizer_states": 29184, "total": 58368}
    assert read["before"]["total"] - read["after"]["total"] == 58368
    assert (read["model"], read["built"], read["optimizer"]) == ("BertModel", "BertModel", "adamw_fp32")


def test_invalid_arguments_are_refused(tmp_path):
    with pytest.raises(VocabularyError, match="optimizer is 'sgd', expected one of adamw_fp32, adamw_bf16, adamw_8bit"):
        memory_report(bert_like(BertConfig), VOCABULARY, "sgd")
    with pytest.raises(VocabularyError, match="the vocabulary is of 9 tokens, but BertModel has 120"):
        memory_report(bert_like(BertConfig), PartialVocabulary([1], 9))
    with pytest.raises(SurgeryError, match="ViTModel has no token embedding"):
        memory_report(ViTConfig(), VOCABULARY)
    with pytest.raises(
        FormatError, match="found a NoneType, expected a Transformers model, a config, a folder or a Hub"
    ):
        memory_report(None, VOCABULARY)
    with pytest.raises(FormatError, match="no model config found"):
        memory_report(str(tmp_path), VOCABULARY)
    with pytest.raises(FormatError, match=r"BertConfig: cannot build AutoModel from this config: .*attention heads"):
        memory_report(bert_like(BertConfig, num_attention_heads=5), VOCABULARY)


@pytest.mark.slow
def test_a_report_of_a_huge_model_takes_little_memory():
    """Report on a model of 100 GB in a process limited to 4 GiB of data."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))\n"
        "from transformers import LlamaConfig; from pema_adapters import PartialVocabulary, memory_report\n"
        "config = LlamaConfig(vocab_size=2_000_000, hidden_size=8192, intermediate_size=8192, num_hidden_layers=2)\n"
        "report = memory_report(config, PartialVocabulary([5], 2_000_000))\n"
        "assert report.before.total > 16 * 8192 * 2_000_000 > 4 * report.after.total"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.slow
def test_adapters_is_not_imported(kind, saved):
    """Its import would take longer than everything else."""
    _, folder, _ = saved(kind)
    code = (
        "import sys; from pema_adapters import PartialVocabulary, memory_report\n"
        f"memory_report({folder!r}, PartialVocabulary([5], {V}))\n"
        "assert 'torch' in sys.modules and 'adapters' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
