"""load_model compared with from_pretrained: the same model, except that the matrix is never allocated."""

import shutil

import pytest
import torch
from adapters import AutoAdapterModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BartModel,
    BertConfig,
    BitsAndBytesConfig,
    LlamaConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    T5Model,
)

from pema_adapters import PartialVocabulary, load_model, shrink_embeddings
from tests.models import MIXED, USED, V, assert_same, bert_like, live_tensors_of_shape, matrix_of, outputs

D = 32
VOCABULARY = PartialVocabulary(USED, V)


@pytest.fixture
def matrices(monkeypatch):
    """The names of all matrices [V, d] that are loaded into modules."""
    seen = []
    original = torch.nn.Module._load_from_state_dict

    def record(module, state_dict, prefix, *args):
        seen.extend(prefix + key for key, tensor in state_dict.items() if tuple(tensor.shape) == (V, D))
        return original(module, state_dict, prefix, *args)

    monkeypatch.setattr(torch.nn.Module, "_load_from_state_dict", record)
    return seen


def seeded(load, *args, **kwargs):
    torch.manual_seed(5)
    return load(*args, **kwargs)


def assert_like_from_pretrained(matrices, model_class, name, inputs=MIXED, **kwargs):
    """Assert that `load_model` gives the model that from_pretrained gives with the same seed. Returns it."""
    partial = seeded(load_model, model_class, name, VOCABULARY, **kwargs)
    assert matrices == []
    assert len(matrix_of(partial)) < V
    full = seeded(model_class.from_pretrained, name, **kwargs)
    embedding = partial.get_input_embeddings()
    assert torch.equal(embedding.weight, matrix_of(full)[embedding.token_ids.long()])
    assert_same(outputs(partial, inputs), outputs(full, inputs))
    assert_same_but_for_the_matrix(partial, full)
    return partial


def assert_same_but_for_the_matrix(partial, full):
    assert partial.training == full.training
    theirs = dict(full.named_parameters())
    for name, ours in partial.named_parameters():
        one, other = ours, theirs.pop(name)
        assert (one.dtype, one.device, one.requires_grad) == (other.dtype, other.device, other.requires_grad), name
        assert one is matrix_of(partial) or torch.equal(one, other), name
    assert not theirs
    assert partial._keys_to_ignore_on_load_unexpected == full._keys_to_ignore_on_load_unexpected
    assert partial.config.to_dict() == full.config.to_dict()


STORED = {
    "safetensors": {},
    "shards": {"max_shard_size": "20KB"},
    "bin": {"safe_serialization": False},
    "shards of bin": {"safe_serialization": False, "max_shard_size": "20KB"},
    "half precision": {},
}


@pytest.mark.parametrize("stored", STORED)
def test_every_kind_of_checkpoint(case, tmp_path, matrices, stored):
    full = case.plain()
    (full.half() if stored == "half precision" else full).save_pretrained(tmp_path / "base", **STORED[stored])
    matrices.clear()
    model = assert_like_from_pretrained(matrices, case.auto_class, tmp_path / "base", dtype="float32")
    assert model.get_input_embeddings().base.matrix.find_in(tmp_path / "base")


OPTIONS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 by name": {"dtype": "float16"},
    "float64": {"dtype": torch.float64},
    "the old name of dtype": {"torch_dtype": torch.bfloat16},
    "as stored": {"dtype": "auto"},
    "a device": {"device_map": "cpu"},
    "a device for all": {"device_map": {"": "cpu"}, "dtype": torch.bfloat16},
    "devices by module": {"device_map": {"bert.embeddings": "cpu", "bert": "cpu", "classifier": "cpu"}},
    "any device": {"device_map": "auto"},
    "attention": {"attn_implementation": "eager"},
    "another head": {"num_labels": 5, "ignore_mismatched_sizes": True},
    "a config": {"config": bert_like(BertConfig, num_labels=5), "ignore_mismatched_sizes": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stored", ["safetensors", "bin"])
def test_every_loading_option(case, tmp_path, matrices, stored, options):
    case.plain().save_pretrained(tmp_path / "base", **STORED[stored])
    matrices.clear()
    assert_like_from_pretrained(matrices, case.auto_class, tmp_path / "base", **OPTIONS[options])


def changed(case, folder, **how):
    """A copy of the base with another matrix."""
    model = case.plain()
    with torch.no_grad():
        matrix_of(model).mul_(-1)
    model.save_pretrained(folder, **how)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ({"variant": "fp16"}, {"variant": "fp16"}),
        ({"variant": "fp16", "max_shard_size": "20KB"}, {"variant": "fp16"}),
        ({"variant": "fp16", "safe_serialization": False}, {"variant": "fp16"}),
        ({"safe_serialization": False}, {"use_safetensors": False}),
        ({}, {"use_safetensors": True}),
    ],
)
def test_rows_come_from_the_files_that_from_pretrained_chooses(case, tmp_path, matrices, how, options):
    """The folder also has files of other kinds, with another matrix."""
    case.plain().save_pretrained(tmp_path / "base", safe_serialization=how != {})
    changed(case, tmp_path / "other", **how)
    for file in (tmp_path / "other").iterdir():
        file.replace(tmp_path / "base" / file.name)
    matrices.clear()
    model = assert_like_from_pretrained(matrices, case.auto_class, tmp_path / "base", **options)
    assert torch.equal(matrix_of(model)[0], -matrix_of(case.plain())[0])


def test_a_subfolder(case, tmp_path, matrices):
    changed(case, tmp_path / "base")
    shutil.copytree(case.folder, tmp_path / "base" / "sub")
    matrices.clear()
    model = assert_like_from_pretrained(matrices, case.auto_class, tmp_path / "base", subfolder="sub")
    assert model.get_input_embeddings().base.matrix.find_in(tmp_path / "base" / "sub")


def test_a_revision_and_a_cache(hub, case, tmp_path, matrices, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    case.plain().push_to_hub("someone/tiny")
    first = hub.commits("someone/tiny")[0].id
    changed(case, tmp_path / "other")
    case.auto_class.from_pretrained(tmp_path / "other").push_to_hub("someone/tiny")
    config = AutoConfig.from_pretrained(case.folder)
    matrices.clear()
    for options in ({}, {"config": config}, {"cache_dir": tmp_path / "cache"}):
        model = assert_like_from_pretrained(matrices, case.auto_class, "someone/tiny", revision=first, **options)
        assert torch.equal(matrix_of(model)[0], matrix_of(case.plain())[0])
        matrices.clear()
    model = assert_like_from_pretrained(matrices, case.auto_class, "someone/tiny")
    assert torch.equal(matrix_of(model)[0], -matrix_of(case.plain())[0])


def test_loading_info_and_warnings_are_those_of_from_pretrained(case, tmp_path, caplog):
    AutoModel.from_pretrained(case.folder).save_pretrained(tmp_path / "headless")
    model, info = load_model(case.auto_class, tmp_path / "headless", VOCABULARY, output_loading_info=True)
    _, expected = case.auto_class.from_pretrained(tmp_path / "headless", output_loading_info=True)
    assert info == expected
    assert len(matrix_of(model)) < V
    assert "word_embeddings" not in caplog.text


SMALL_BART = {
    "vocab_size": V, "d_model": D, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 40,
    "dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "scale_embedding": True,
}  # fmt: skip
SMALL_T5 = {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
LLAMA = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip
ENDING = {**MIXED, "input_ids": torch.tensor([[3, 4, 8, 2], [21, 119, 55, 2]])}
DECODING = {**MIXED, "decoder_input_ids": torch.tensor([[0, 8, 99], [0, 119, 2]])}
OTHERS = {  # class that is saved, class that is loaded, config, inputs
    "a base of a task's": (AutoModelForSequenceClassification, AutoModel, bert_like(BertConfig), MIXED),
    "a task's of a base": (AutoModel, AutoModelForSequenceClassification, bert_like(BertConfig), MIXED),
    "an output of its own": (AutoModelForCausalLM, AutoModelForCausalLM, LlamaConfig(**LLAMA), MIXED),
    "an output cut off": (AutoModelForMaskedLM, AutoModelForSequenceClassification, bert_like(BertConfig), MIXED),
    "bart": (BartModel, BartModel, BartConfig(**SMALL_BART), DECODING),
    "bart's task": (BartModel, BartForSequenceClassification, BartConfig(**SMALL_BART), ENDING),
    "t5": (T5Model, T5Model, T5Config(**SMALL_T5), DECODING),
    "t5's encoder": (T5ForConditionalGeneration, T5EncoderModel, T5Config(**SMALL_T5), MIXED),
    "t5's task": (T5Model, T5ForSequenceClassification, T5Config(**SMALL_T5, eos_token_id=2, decoder_start_token_id=0), ENDING),
    "t5, untied": (
        T5ForConditionalGeneration, T5ForConditionalGeneration, T5Config(**SMALL_T5, tie_word_embeddings=False),
        DECODING,
    ),
}  # fmt: skip


@pytest.mark.parametrize("stored", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_of_model(tmp_path, matrices, kind, stored):
    saved, loaded, config, inputs = OTHERS[kind]
    make = saved.from_config if hasattr(saved, "from_config") else saved
    torch.manual_seed(3)
    make(config).save_pretrained(tmp_path / "base", **STORED[stored])
    matrices.clear()
    partial = seeded(load_model, loaded, tmp_path / "base", VOCABULARY)
    assert len(matrices) == ("lm_head.weight" in partial.state_dict())  # a separate output is loaded as usual
    assert len(matrix_of(partial)) < V
    full = seeded(loaded.from_pretrained, tmp_path / "base")
    assert_same(outputs(partial, inputs), outputs(full, inputs))
    assert_same_but_for_the_matrix(partial, full)


@pytest.mark.parametrize("stored", ["safetensors", "bin"])
def test_an_offloaded_embedding_keeps_its_rows_in_memory(case, tmp_path, matrices, stored):
    case.plain().save_pretrained(tmp_path / "base", **STORED[stored])
    where = {"bert.embeddings": "disk", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    matrices.clear()
    options = {"device_map": where, "offload_folder": tmp_path / "offload"}
    partial = seeded(load_model, case.auto_class, tmp_path / "base", VOCABULARY, **options)
    assert matrices == []
    full = seeded(case.auto_class.from_pretrained, tmp_path / "base", **options)
    assert_same(outputs(partial, MIXED), outputs(full, MIXED))
    assert_same([matrix_of(partial)], [matrix_of(case.plain())[partial.get_input_embeddings().token_ids.long()]])


def test_a_quantised_encoder(tmp_path, matrices):
    pytest.importorskip("bitsandbytes")
    config = BertConfig(
        vocab_size=V, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    torch.manual_seed(3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    for options in ({"dtype": torch.float32}, {}):
        how = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu", **options}
        partial = seeded(load_model, AutoModelForSequenceClassification, tmp_path / "base", VOCABULARY, **how)
        assert len(live_tensors_of_shape((V, 64))) == 0
        full = seeded(AutoModelForSequenceClassification.from_pretrained, tmp_path / "base", **how)
        assert_same(outputs(partial, MIXED), outputs(full, MIXED))
        assert_same_but_for_the_matrix(partial, full)
        del full


def test_an_adapter_model(case, matrices):
    partial = seeded(load_model, AutoAdapterModel, case.folder, VOCABULARY)
    assert matrices == []
    full = seeded(AutoAdapterModel.from_pretrained, case.folder)
    assert_same(outputs(partial, MIXED), outputs(full, MIXED))
    assert_same_but_for_the_matrix(partial, full)
    partial.add_adapter("task", config="pema", set_active=True)
    shrink_embeddings(partial, "task", PartialVocabulary([3], V))
    assert len(matrix_of(partial)) == 0  # the rows are the adapter's now
    assert set(USED) <= set(partial.base_model.pema.adapters["task"].token_ids.tolist())
    assert_same(outputs(partial, MIXED), outputs(full, MIXED))


def test_a_key_mapping_of_other_tensors_still_defers_the_matrix(case, matrices):
    mapping = {"^classifier": "classifier"}
    assert_like_from_pretrained(matrices, case.auto_class, case.folder, key_mapping=mapping)
