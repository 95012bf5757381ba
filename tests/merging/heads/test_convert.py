"""A standard head computes exactly what the flexible head computes, and Transformers loads it; all others stay."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import adapters
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from pema_adapters.errors import FormatError
from pema_adapters.formats.delta import Head
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.weights import read_tensors
from pema_adapters.merging.heads.convert import StandardHead, convert_head
from pema_adapters.merging.heads.labels import label_settings, read_labels
from pema_adapters.merging.heads.registry import DEFAULTS, STANDARD

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_value. is deprecated:FutureWarning")

V, D, EOS, PAD = 24, 8, 2, 1
ENCODER = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
NARROW, LLAMA = ENCODER | {"embedding_size": 6}, ENCODER | {"num_key_value_heads": 1}
BART = {"d_model": D, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "scale_embedding": True,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}  # fmt: skip
T5 = {"d_model": D, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
GPT = {"n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 32}
SIZES = {
    "albert": NARROW, "bart": BART, "bert": ENCODER, "bert-generation": ENCODER, "electra": NARROW,
    "deberta-v2": ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, "gpt2": GPT, "llama": LLAMA,
    "distilbert": {"dim": D, "n_layers": 1, "n_heads": 2, "hidden_dim": 12}, "gptj": GPT | {"rotary_dim": 4},
    "mbart": BART, "mistral": LLAMA, "mt5": T5, "plbart": BART, "roberta": ENCODER, "t5": T5, "xlm-roberta": ENCODER,
    "xmod": ENCODER | {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip

POOLED, ONE, BIASED = {"layers": 1, "use_pooler": True}, {"layers": 1}, {"layers": 1, "bias": True}
TANH, GELU, RELU = ({"layers": 2, "activation_function": name} for name in ("tanh", "gelu", "relu"))
MASKED = {"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True}


def classes(settings, **more):
    return {"classification": settings, "multilabel_classification": settings} | more


def encoder(settings, choice, **more):
    return classes(settings, multiple_choice=choice, tagging=ONE, question_answering=ONE, masked_lm={}) | more


DECODER = {"tagging": ONE, "question_answering": ONE, "causal_lm": ONE}
SEQ2SEQ = classes(TANH, question_answering=ONE, seq2seq_lm={})
SAME = {
    "albert": encoder(POOLED, POOLED, masked_lm={"activation_function": "gelu_new"}),
    "bart": SEQ2SEQ,
    "bert": encoder(POOLED, POOLED, causal_lm=MASKED),
    "bert-generation": {"causal_lm": BIASED},
    "deberta-v2": encoder(GELU, GELU),
    "distilbert": encoder(RELU, RELU),
    "electra": encoder(GELU, GELU, causal_lm=MASKED),
    "gpt2": DECODER,
    "gptj": {"question_answering": ONE, "causal_lm": BIASED},
    "llama": DECODER,
    "mbart": SEQ2SEQ,
    "mistral": DECODER,
    "mt5": SEQ2SEQ,
    "plbart": classes(TANH, seq2seq_lm={}),
    "roberta": encoder(TANH, POOLED, causal_lm=MASKED),
    "t5": classes(TANH, seq2seq_lm={}),
    "xlm-roberta": encoder(TANH, POOLED, causal_lm=MASKED),
}
CASES = [(model, kind, settings, {}) for model, kinds in SAME.items() for kind, settings in kinds.items()] + [
    ("bert", "masked_lm", {}, {"tie_word_embeddings": False}),
    ("bert", "masked_lm", {"activation_function": "relu"}, {"hidden_act": "relu"}),
    ("t5", "question_answering", ONE, {"tie_word_embeddings": False}),
    ("mt5", "seq2seq_lm", {}, {"tie_word_embeddings": True}),
    ("llama", "causal_lm", ONE, {"tie_word_embeddings": True}),
    ("deberta-v2", "classification", TANH, {"pooler_hidden_act": "tanh"}),
]


def config_of(model_type, **changes):
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 0, "decoder_start_token_id": EOS}
    made = AutoConfig.for_model(model_type, vocab_size=V, **{**SIZES[model_type], **ids, **changes})
    made._attn_implementation = "eager"
    return made


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model.eval()


def flexible(config, kind, settings):
    """A plain backbone, and an AutoAdapterModel with the same weights and a head "task"."""
    torch.manual_seed(0)
    backbone = randomised(AutoModel.from_config(config))
    model = adapters.AutoAdapterModel.from_config(config)
    size = {"num_labels": 2 if kind == "question_answering" else 3} if "num_labels" in DEFAULTS[kind] else {}
    model.add_prediction_head_from_config("task", {"head_type": kind, **size, **settings})
    randomised(model.heads["task"])
    found = model.base_model.load_state_dict(backbone.state_dict(), strict=False)
    assert all("adapter_modules" in name for name in found.unexpected_keys)  # X-MOD's; adapters takes them out
    model.tie_weights()
    return backbone, model.eval()


def saved_head(model, folder):
    model.save_head(str(folder), "task", use_safetensors=True)
    return Head(json.loads((folder / "head_config.json").read_text()), read_tensors(folder / "model_head.safetensors"))


def checkpoint(folder, backbone, standard, config):
    """What a merge writes: the backbone under the prefix of the class, the head, config.json."""
    folder.mkdir()
    inside = f"{standard.prefix}." if standard.prefix else ""
    tensors = {inside + name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    assert not tensors.keys() & standard.tensors.keys()
    for name, stored in standard.tensors.items():
        assert stored.name == name
        tensors[name] = torch.from_numpy(np.array(stored.raw)).view(torch.float32).reshape(stored.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = config.to_diff_dict() | standard.config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))


def batch(kind, config):
    ids = torch.tensor([[0, 5, 6, 7, EOS], [0, 9, EOS, PAD, PAD]])
    inputs = {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}
    if kind == "seq2seq_lm":
        inputs["decoder_input_ids"] = torch.tensor([[EOS, 8, 4], [EOS, 3, 11]])
    return {name: tensor.unsqueeze(0) for name, tensor in inputs.items()} if kind == "multiple_choice" else inputs


def logits(model, inputs):
    with torch.no_grad():
        made = model.eval()(**inputs)
    return [made.logits] if "logits" in made else [made.start_logits, made.end_logits]


def loaded(folder, backbone, standard, config):
    checkpoint(folder, backbone, standard, config)
    cls = getattr(transformers, standard.model_class)
    merged, info = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    unexpected = {name for name in info["unexpected_keys"] if "pooler" not in name}
    assert not (info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"] or unexpected), info
    return merged.double().float()  # in memory of its own: what is mapped from a file is aligned differently


@pytest.mark.parametrize("model_type, kind, settings, changes", CASES)
def test_the_standard_head_is_the_same_function(model_type, kind, settings, changes, tmp_path):
    config = config_of(model_type, **changes)
    backbone, model = flexible(config, kind, settings)
    standard = convert_head(saved_head(model, tmp_path), config.to_diff_dict())
    assert isinstance(standard, StandardHead), standard
    assert set(standard.needs) <= backbone.state_dict().keys()
    matrices = [stored for stored in standard.tensors.values() if stored.shape[0] == V and len(stored.shape) == 2]
    assert len(matrices) == (kind.endswith("_lm") and not config.tie_word_embeddings)
    merged, inputs = loaded(tmp_path / "merged", backbone, standard, config), batch(kind, config)
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(merged, inputs), expected)
    adapters.init(merged)  # where the attention of adapters rounds differently; the head stays as it is
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=0, atol=0)


OTHERS = [
    ("gpt2", "classification", {"layers": 1, "bias": False}, "GPT2ForSequenceClassification", "score"),
    ("llama", "classification", {"layers": 1, "bias": False}, "LlamaForSequenceClassification", "score"),
    ("xmod", "tagging", ONE, "XmodForTokenClassification", "classifier"),
    ("t5", "question_answering", ONE, "T5ForQuestionAnswering", "qa_outputs"),
]


@pytest.mark.parametrize("model_type, kind, settings, model_class, layer", OTHERS)
def test_where_a_class_computes_something_else(model_type, kind, settings, model_class, layer, tmp_path):
    config = config_of(model_type)
    backbone, model = flexible(config, kind, settings)
    head = saved_head(model, tmp_path)
    assert isinstance(convert_head(head, config.to_diff_dict()), str)
    tensors = {name.replace("heads.task.1", layer): tensor for name, tensor in head.tensors.items()}
    tensors = {name: replace(tensor, name=name) for name, tensor in tensors.items()}
    labelled = {"id2label": {i: str(i) for i in range(model.heads["task"].config["num_labels"])}}
    prefix = "" if model_type == "t5" else STANDARD[model_type].prefix
    merged = loaded(tmp_path / "merged", backbone, StandardHead(model_class, tensors, labelled, prefix), config)
    padded_left = {name: tensor.flip(1) for name, tensor in batch(kind, config).items()}
    assert not torch.allclose(logits(merged, padded_left)[0], logits(model, padded_left)[0])


def made(kind="classification", shape=(3, D), config=None, tensors=None, name="task", **settings):
    """A head by hand, of one layer on the pooler."""
    found = {"head_type": kind, "num_labels": 3, "layers": 1, "use_pooler": True, **settings}
    full = {"config": found if config is None else config, "name": name}
    tensors = {"heads.task.1.weight": shape, "heads.task.1.bias": shape[:1], **(tensors or {})}
    source = SimpleNamespace(path=Path("run/model_head.safetensors"))
    return Head(full, {n: StoredTensor(n, "F32", s, source, 0, 0) for n, s in tensors.items() if s})


def lm(kind, **settings):
    return {"config": {"head_type": kind, **settings}, "tensors": {"heads.task.0.bias": (3,)}}


BASE = {"model_type": "bert", "hidden_size": D, "vocab_size": V, "n_embd": D, "d_model": D}
TWO = {"layers": 2, "use_pooler": False}
CLASS = "ForSequenceClassification"
NONE = "no Transformers class for a head of type"
STAYS = [
    ("bert", {}, {"config": {"head_type": "classification"}},
     f"Bert{CLASS} has 1 layer, on the pooler; this head has 2 layers, tanh, without pooler"),
    ("bert", {}, {"bias": False},
     f"Bert{CLASS} has 1 layer, on the pooler; this head has 1 layer, on the pooler, without output bias"),
    ("roberta", {}, {}, f"Roberta{CLASS} has 2 layers, tanh, without pooler; this head has 1 layer, on the pooler"),
    ("deberta-v2", {"pooler_hidden_act": "relu"}, TWO,
     f"DebertaV2{CLASS} has 2 layers, relu, without pooler; this head has 2 layers, tanh, without pooler"),
    ("deberta-v2", {"pooler_hidden_size": 6}, TWO | {"activation_function": "gelu"},
     f"DebertaV2{CLASS} is the same only with pooler_hidden_size 8 in config.json"),
    ("deberta-v2", {"legacy": False}, lm("masked_lm"),
     "DebertaV2ForMaskedLM is the same only with legacy true in config.json"),
    ("albert", {}, lm("masked_lm"),
     "AlbertForMaskedLM has 2 layers, gelu_new, layer norm; this head has 2 layers, gelu, layer norm"),
    ("bert", {"hidden_act": 3}, lm("masked_lm"),
     "BertForMaskedLM has 2 layers, 3, layer norm; this head has 2 layers, gelu, layer norm"),
    ("bert", {}, lm("masked_lm", embedding_size=4), "BertForMaskedLM is 8 wide before its output; this head is 4"),
    ("gptj", {}, lm("causal_lm", vocab_size=3, **BIASED),
     "GPTJForCausalLM has 24 outputs, one a token; this head has 3"),
    ("gptj", {}, lm("causal_lm"), "GPTJForCausalLM has 1 layer; this head has 1 layer, without output bias"),
    ("t5", {}, lm("question_answering"),
     "T5ForQuestionAnswering is the same only with tie_word_embeddings false in config.json"),
    ("bert", {}, lm("question_answering", num_labels=3),
     "BertForQuestionAnswering has 2 outputs, start and end; this head has 3"),
    ("bert", {}, {"label2id": {"no": 0}}, 'it has 3 labels, its label2id {"no": 0}'),
    ("bert", {}, {"gated": True}, "its setting 'gated' is not known"),
    ("bert", {"hidden_size": None}, {}, "config.json of the base does not say hidden_size"),
    (None, {}, {}, f"{NONE} 'classification' on a base of type None"),
    ("bert", {}, {"kind": "dependency_parsing"}, f"{NONE} 'dependency_parsing' on a base of type 'bert'"),
    ("xmod", {}, {}, f"Xmod{CLASS} computes with the language adapters of X-MOD; adapters takes them out, "
     "so this head never saw them"),
    ("mistral", {}, {}, f"Mistral{CLASS} reads the last token, this head another one where padding is not at the end"),
]  # fmt: skip


@pytest.mark.parametrize("model_type, base, head, reason", STAYS)
def test_what_no_class_equals_stays_for_a_reason(model_type, base, head, reason):
    assert convert_head(made(**head), BASE | {"model_type": model_type} | base) == reason


DAMAGED = [
    ({"config": {}}, 'found {"name": "task", "config": {}}; expected the name and the config'),
    ({"layers": "1"}, 'head_config.json: layers is "1"; expected an integer above 0'),
    ({"num_labels": True}, "num_labels is true; expected an integer above 0"),
    ({"use_pooler": None}, "use_pooler is null; expected true or false"),
    ({"activation_function": 1}, "activation_function is 1; expected a name or null"),
    ({"label2id": {"a": "0"}}, 'label2id is {"a": "0"}; expected {label: number} or null'),
    ({"num_labels": 4}, "model_head.safetensors: tensor 'heads.task.1.weight' is F32 [3, 8]; expected floats [4, 8]"),
    ({"tensors": {"heads.task.1.bias": (4,)}}, "tensor 'heads.task.1.bias' is F32 [4]; expected floats [3]"),
    ({"tensors": {"heads.task.1.bias": None}}, "head_config.json: tensor 'heads.task.1.bias' [3] expected, found none"),
    ({"tensors": {"heads.task.4.bias": (3,)}}, "unexpected tensor 'heads.task.4.bias'; expected heads.task.1.weight"),
    ({"name": "other"}, "tensor 'heads.other.1.weight' [3, 8] expected, found none"),
]


@pytest.mark.parametrize("head, message", DAMAGED)
def test_a_damaged_head_is_an_error_of_one_line(head, message):
    with pytest.raises(FormatError) as error:
        convert_head(made(**head), BASE)
    assert message in str(error.value) and "\n" not in str(error.value)


NAMED, DEFAULT = {"no": 0, "yes": 1, "maybe": 2}, {f"LABEL_{i}": i for i in range(3)}
CHOICES = {"head_type": "multiple_choice", "num_choices": 3, "layers": 1, "use_pooler": True}
SETTINGS = [
    ({}, f"Bert{CLASS}", DEFAULT, None),
    ({"label2id": NAMED}, f"Bert{CLASS}", NAMED, None),
    ({"num_labels": 2, "shape": (2, D)}, f"Bert{CLASS}", None, None),
    ({"num_labels": 1, "shape": (1, D)}, f"Bert{CLASS}", {"LABEL_0": 0}, "regression"),
    ({"kind": "multilabel_classification"}, f"Bert{CLASS}", DEFAULT, "multi_label_classification"),
    ({"config": CHOICES | {"label2id": DEFAULT}, "shape": (1, D)}, "BertForMultipleChoice", None, None),
    ({"config": CHOICES | {"label2id": NAMED}, "shape": (1, D)}, "BertForMultipleChoice", NAMED, None),
]


@pytest.mark.parametrize("head, model_class, label2id, problem", SETTINGS)
def test_config_json_says_class_labels_and_problem(head, model_class, label2id, problem):
    standard = convert_head(made(**head), BASE)
    id2label = {str(number): label for label, number in label2id.items()} if label2id else None
    assert standard.model_class == model_class
    assert standard.config == {"architectures": [model_class], "id2label": id2label, "label2id": label2id,
                               "problem_type": problem, "num_labels": None}  # fmt: skip


def test_labels_come_in_the_order_of_their_numbers():
    where = Path("head_config.json")
    assert list(read_labels({"label2id": {"b": 1, "a": 0}, "num_labels": 2}, where)) == ["a", "b"]
    assert read_labels({"num_labels": 1}, where) == {"LABEL_0": 0} and read_labels({}, where) == {}
    assert label_settings({"a": 0}) == {"id2label": {"0": "a"}, "label2id": {"a": 0}}


def test_tensors_of_another_head_with_a_longer_name_are_not_its_own():
    head = made(tensors={"heads.task2.1.weight": (5, D), "heads.task2.1.bias": (5,)})
    assert convert_head(head, BASE).tensors.keys() == {"classifier.weight", "classifier.bias"}
