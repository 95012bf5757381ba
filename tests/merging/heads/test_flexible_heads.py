"""A flexible head in a merge: the head of an ordinary class where one computes the same, else kept for load_head."""

import json

import adapters
import pytest
import torch
import transformers
from adapters import AutoAdapterModel, ConfigUnion, LoRAConfig, SeqBnConfig, SeqBnInvConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
)

import pema_adapters
from pema_adapters import merge_checkpoint
from pema_adapters.errors import FormatError, MergeError
from tests.merging.conftest import read
from tests.models import CONFIGS, USED, V

SIZES = {"vocab_size": V, "max_position_embeddings": 40}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
        "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "dropout": 0.0}  # fmt: skip
LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
MORE = {
    "bart": lambda: BartConfig(**SIZES, **BART, eos_token_id=2, decoder_start_token_id=2),
    "gpt2": lambda: GPT2Config(vocab_size=V, n_embd=32, n_layer=1, n_head=2, n_positions=40, eos_token_id=2),
    "llama": lambda: LlamaConfig(**SIZES, **LLAMA, pad_token_id=0),
}
FULL = {"output_embeddings": "full"}
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


def pooler_of(model):
    """What AutoAdapterModel reads beside a language model, and published checkpoints of BERT have."""
    if not isinstance(model, BertForMaskedLM):
        return {}
    return {f"bert.pooler.{name}": tensor for name, tensor in BertModel(model.config).pooler.state_dict().items()}


def trained(tmp_path, family, add_head, config, base_class=AutoAdapterModel):
    torch.manual_seed(3)
    make = getattr(base_class, "from_config", None) or base_class._from_config
    made = make((CONFIGS | MORE)[family]())
    made.save_pretrained(tmp_path / "base", state_dict=made.state_dict() | pooler_of(made))
    return trained_on(tmp_path, add_head, config)


def trained_on(tmp_path, add_head, config):
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


def merged(tmp_path, **options):
    return merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out", **options)


def flexible(tmp_path):
    """The merged model where a flexible head stays, as `pema-merge` prints it."""
    model, left = AutoAdapterModel.from_pretrained(tmp_path / "out"), tmp_path / "out" / "adapters" / "task"
    load = model.load_adapter if (left / "adapter_config.json").exists() else model.load_head
    load(str(left), **({"set_active": True} if load == model.load_adapter else {}), use_safetensors=True)
    return model


def ordinary(tmp_path):
    """The merged model by the class that config.json names; nothing may be missing."""
    name = json.loads((tmp_path / "out" / "config.json").read_bytes())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("pooler" in name for name in info["unexpected_keys"])
    return model


def assert_same(model, other):
    torch.testing.assert_close(outputs(model), outputs(other), rtol=1e-5, atol=1e-5)


def pema(*others, **settings):
    return ConfigUnion(pema_adapters.PEMAConfig(**settings), *(others or [LoRAConfig()]))


def masked(model):
    model.add_masked_lm_head("task")


def causal(model):
    model.add_prediction_head_from_config("task", {"head_type": "causal_lm"})


UNTIED = [
    ("bert", masked, BertModel, "cls.predictions.decoder.weight"),
    ("electra", masked, AutoAdapterModel, "generator_lm_head.weight"),
    ("roberta", masked, AutoAdapterModel, "lm_head.decoder.weight"),
    ("gpt2", causal, AutoAdapterModel, "lm_head.weight"),
    ("bert", lambda model: None, BertForMaskedLM, "cls.predictions.decoder.weight"),
]


@pytest.mark.parametrize(("family", "add_head", "base_class", "name"), UNTIED)
def test_an_untied_output_has_the_name_of_the_class(tmp_path, family, add_head, base_class, name):
    model = trained(tmp_path, family, add_head, pema(**FULL), base_class)
    if base_class is BertForMaskedLM:  # its head is not the adapter's, so that it is not saved
        untouched = AutoAdapterModel.from_pretrained(tmp_path / "base").heads.state_dict()
        model.heads.load_state_dict(untouched, strict=False)
    report = merged(tmp_path, verify=True)
    found = read(tmp_path / "out")
    assert name in found and not any(key.startswith("heads.") for key in found)
    assert f"{name} keeps the base's matrix and is no longer tied to the embedding" in report.notes
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["tie_word_embeddings"] is False
    assert_same(ordinary(tmp_path), model)


def test_an_untied_output_stays_with_a_head_of_no_class(tmp_path):
    model = trained(tmp_path, "bert", causal, pema(**FULL), BertModel)
    report = merged(tmp_path, verify=True)
    assert not any(name.startswith("heads.") for name in read(tmp_path / "out"))
    left = load_file(tmp_path / "out" / "adapters" / "task" / "model_head.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert left.keys() == {"heads.task.0.weight"} and torch.equal(left["heads.task.0.weight"], base)
    assert any("BertLMHeadModel has 2 layers" in note for note in report.notes)
    assert_same(flexible(tmp_path), model)


def test_an_untied_output_that_is_not_the_adapter_s(tmp_path):
    """The adapter has another head; the merged model has no place for the other one, and is tied as its base is."""

    def add_heads(model):
        model.add_masked_lm_head("language")
        model.add_tagging_head("task", num_labels=5)

    model = trained(tmp_path, "bert", add_heads, pema(**FULL), BertModel)
    report = merged(tmp_path)
    note = "the head 'language' of the trained model is not part of the delta; the output stays tied to E"
    assert note in report.notes
    assert "tie_word_embeddings" not in json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert_same(ordinary(tmp_path), model)


def test_an_untied_output_of_an_unknown_class_is_refused(tmp_path):
    trained(tmp_path, "bert", lambda model: None, pema(**FULL), BertForMaskedLM)
    path = tmp_path / "base" / "config.json"
    path.write_text(path.read_text().replace("BertForMaskedLM", "BertForPreTraining"))
    with pytest.raises(
        MergeError, match=r"config.json: BertForPreTraining is not known, so there is no place for 'heads"
    ):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()


def test_new_tokens_and_an_untied_output_are_refused(tmp_path):
    def add_head(model):
        model.resize_token_embeddings(V + 2)
        model.add_masked_lm_head("task")

    trained(tmp_path, "bert", add_head, pema(**FULL), BertModel)
    with pytest.raises(MergeError, match=r"no rows of 'cls.*' for the new ones"):
        merged(tmp_path)


TIED = [
    ("bart", lambda model: model.add_seq2seq_lm_head("task"), AutoAdapterModel, "BartForConditionalGeneration"),
    ("gpt2", causal, AutoAdapterModel, "GPT2LMHeadModel"),
    ("gpt2", causal, GPT2LMHeadModel, "GPT2LMHeadModel"),
]


@pytest.mark.parametrize(("family", "add_head", "base_class", "name"), TIED)
def test_a_head_that_is_all_tied_is_not_lost(tmp_path, family, add_head, base_class, name):
    model = trained(tmp_path, family, add_head, pema(), base_class)
    report = merged(tmp_path, verify=True)
    assert f"its flexible head is now that of {name}" in report.notes
    assert_same(ordinary(tmp_path), model)


def test_a_head_that_is_all_tied_and_of_no_class_stays(tmp_path):
    model = trained(tmp_path, "bert", causal, pema(SeqBnConfig()), BertModel)
    assert merged(tmp_path).adapters_left == ("task",)
    assert_same(flexible(tmp_path), model)


def test_a_head_without_its_weights_is_refused(tmp_path):
    trained(tmp_path, "bert", masked, pema(), BertModel)
    (tmp_path / "run" / "model_head.safetensors").unlink()
    with pytest.raises(
        FormatError, match=r"head_config.json: a head without weights; expected model_head.safetensors or"
    ):
        merged(tmp_path)


def stored_in_base(tmp_path, **tensors):
    """More tensors in the base, after the training."""
    path = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})


def test_no_class_adds_a_bias_of_the_base(tmp_path):
    BartForConditionalGeneration(MORE["bart"]()).save_pretrained(tmp_path / "base")
    stored_in_base(tmp_path, final_logits_bias=torch.randn(1, V))
    model = trained_on(tmp_path, lambda m: m.add_seq2seq_lm_head("task"), pema())
    report = merged(tmp_path)
    assert any(
        "BartForConditionalGeneration adds final_logits_bias of the base, which the" in note for note in report.notes
    )
    assert_same(flexible(tmp_path), model)


def test_no_class_where_the_output_s_bias_is_stored_twice(tmp_path):
    """Transformers reads the one, adapters the other."""
    made = BertForMaskedLM(CONFIGS["bert"]())
    made.save_pretrained(tmp_path / "base", state_dict=made.state_dict() | pooler_of(made))
    stored_in_base(tmp_path, **{"cls.predictions.decoder.bias": torch.randn(V)})
    model = trained_on(tmp_path, masked, pema())
    report = merged(tmp_path)
    assert any("the base stores the bias of its output twice" in note for note in report.notes)
    assert_same(flexible(tmp_path), model)


def test_no_class_without_a_pooler_in_the_base(tmp_path):
    """The model drew one at random, so that the base is another one to begin with."""
    BertModel(CONFIGS["bert"](), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    head = {"head_type": "classification", "num_labels": 3, "layers": 1, "use_pooler": True}
    trained_on(tmp_path, lambda m: m.add_prediction_head_from_config("task", dict(head)), pema())
    report = merged(tmp_path, allow_base_mismatch=True)
    assert any(
        "BertForSequenceClassification needs pooler.dense.weight, which the base lacks" in n for n in report.notes
    )
    assert (tmp_path / "out" / "adapters" / "task" / "head_config.json").exists()


def test_no_class_that_calls_its_backbone_something_else(tmp_path):
    model = trained(tmp_path, "llama", HEADS["qa"][1], pema(), LlamaModel)
    report = merged(tmp_path)
    assert any(
        "LlamaForQuestionAnswering calls its backbone 'transformer', the base 'model'" in n for n in report.notes
    )
    assert_same(flexible(tmp_path), model)


@pytest.mark.parametrize("settings", [{}, FULL])
def test_no_class_undoes_an_invertible_adapter(tmp_path, settings):
    model = trained(tmp_path, "bert", masked, pema(SeqBnInvConfig(), **settings), BertModel)
    report = merged(tmp_path)
    assert any("the adapter is invertible, and undone before the head" in note for note in report.notes)
    assert_same(flexible(tmp_path), model)
