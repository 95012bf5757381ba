"""What the head of each ordinary Transformers class computes, as data: by model type and type of flexible head."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

HIDDEN = "hidden_size"
TIE = "tie_word_embeddings"
_LANGUAGE_MODELS = re.compile("LM|PreTraining|ConditionalGeneration|Decoder$")


def is_language_model(model_class: str) -> bool:
    """Return whether a Transformers class, by its name, gives logits over the vocabulary."""
    return _LANGUAGE_MODELS.search(model_class) is not None


@dataclass(frozen=True)
class Standard:
    """The head of a Transformers class; `suffix` follows the name of the family in that of the class.

    layers: those with weights, in order: (output), (dense, output) or (dense, norm, output).
    activation: after dense; a pair is a key of config.json and its default. pooler: the backbone's, "" where the head
    reads hidden states. bias: of the output layer; bias_name: how Transformers loads it, where not as the layer's.
    inner: what (dense, norm) are wide, a key of config.json and its default, where not as the backbone (HIDDEN).
    requires: what config.json must say if anything; HIDDEN stands for the backbone's width. prefix: of the backbone,
    where not the family's. zero: tensors that the class adds to the output.
    """

    suffix: str
    layers: tuple[str, ...]
    activation: str | tuple[str, str] | None = None
    pooler: str = ""
    bias: bool = True
    bias_name: str = ""
    inner: tuple[str, int | str] = ("", HIDDEN)
    requires: dict[str, Any] = field(default_factory=dict)
    prefix: str | None = None
    zero: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFamily:
    """The classes of a model type, by head type: `name` begins theirs. `hidden`: the key of its width.

    `heads` has a reason instead where a class exists but computes something else. `tied`: where config.json is silent.
    """

    name: str
    prefix: str
    heads: dict[str, Standard | str]
    hidden: str = HIDDEN
    tied: bool = True


_ACT = ("hidden_act", "gelu")
_NARROW = "embedding_size"
_TAGS = Standard("ForTokenClassification", ("classifier",))
_SPAN = Standard("ForQuestionAnswering", ("qa_outputs",))
_CLASS = Standard("ForSequenceClassification", ("classifier",))
_DENSE = Standard("ForSequenceClassification", ("classifier.dense", "classifier.out_proj"), "tanh")
_LM = Standard("ForCausalLM", ("lm_head",), bias=False)
_BERT = Standard(
    "ForMaskedLM",
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"),
    _ACT, bias_name="cls.predictions.bias",
)  # fmt: skip
_ALBERT = Standard(
    "ForMaskedLM", ("predictions.dense", "predictions.LayerNorm", "predictions.decoder"), ("hidden_act", "gelu_new"),
    bias_name="predictions.bias", inner=(_NARROW, 128),
)  # fmt: skip
_ROBERTA = Standard(
    "ForMaskedLM", ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"), "gelu", bias_name="lm_head.bias"
)
_ELECTRA = Standard(
    "ForMaskedLM", ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"), "gelu",
    inner=(_NARROW, 128),
)  # fmt: skip
_DISTIL = Standard("ForSequenceClassification", ("pre_classifier", "classifier"), "relu")
_DEBERTA = Standard(
    "ForSequenceClassification", ("pooler.dense", "classifier"), ("pooler_hidden_act", "gelu"),
    requires={"pooler_hidden_size": HIDDEN},
)  # fmt: skip
_SUMMARY = Standard(
    "ForMultipleChoice", ("sequence_summary.summary", "classifier"), ("summary_activation", "gelu"),
    requires={"summary_type": "first", "summary_use_proj": True, "summary_proj_to_labels": False},
)  # fmt: skip
_LAST = "ForSequenceClassification reads the last token, this head another one where padding is not at the end"

_LANGUAGES = " computes with the language adapters of X-MOD; adapters takes them out, so this head never saw them"


def _encoder_heads(pooler: str, **more: Standard | str) -> dict[str, Standard | str]:
    found = replace(_CLASS, pooler=pooler)
    choice = replace(found, suffix="ForMultipleChoice")
    return {"classification": found, "multiple_choice": choice, "tagging": _TAGS, "question_answering": _SPAN} | more


def _seq2seq_heads(
    span: Standard | None, prefix: str | None = None, zero: tuple[str, ...] = ()
) -> dict[str, Standard | str]:
    dense = replace(_DENSE, layers=("classification_head.dense", "classification_head.out_proj"))
    lm = replace(_LM, suffix="ForConditionalGeneration", prefix=prefix, zero=zero)
    made: dict[str, Standard | str] = {"classification": dense, "seq2seq_lm": lm}
    return {**made, "question_answering": span} if span else made


_ROBERTAS = _encoder_heads(
    "pooler.dense", classification=_DENSE, masked_lm=_ROBERTA, causal_lm=replace(_ROBERTA, suffix="ForCausalLM")
)
_T5 = _seq2seq_heads(
    replace(_SPAN, prefix="", requires={TIE: False}), prefix=""
)  # a tied T5 scales what its heads read
_BIAS = ("final_logits_bias",)
_DECODER: dict[str, Standard | str] = {"classification": _LAST, "question_answering": _SPAN, "causal_lm": _LM}
_SCORE: dict[str, Standard | str] = {"tagging": replace(_TAGS, layers=("score",))}

STANDARD = {
    "albert": ModelFamily("Albert", "albert", _encoder_heads("pooler", masked_lm=_ALBERT)),
    "bart": ModelFamily("Bart", "model", _seq2seq_heads(_SPAN, zero=_BIAS), "d_model"),
    "bert": ModelFamily("Bert", "bert", _encoder_heads(
        "pooler.dense", masked_lm=_BERT, causal_lm=replace(_BERT, suffix="LMHeadModel")
    )),
    "bert-generation": ModelFamily("BertGeneration", "bert", {
        "causal_lm": Standard("Decoder", ("lm_head.decoder",), bias_name="lm_head.bias"),
    }),
    "deberta-v2": ModelFamily("DebertaV2", "deberta", _encoder_heads(
        "", classification=_DEBERTA, multiple_choice=replace(_DEBERTA, suffix="ForMultipleChoice"),
        masked_lm=replace(_BERT, inner=(_NARROW, HIDDEN), requires={"legacy": True}),
    )),
    "distilbert": ModelFamily("DistilBert", "distilbert", _encoder_heads(
        "", classification=_DISTIL, multiple_choice=replace(_DISTIL, suffix="ForMultipleChoice"),
        masked_lm=Standard(
            "ForMaskedLM", ("vocab_transform", "vocab_layer_norm", "vocab_projector"), ("activation", "gelu")
        ),
    ), "dim"),
    "electra": ModelFamily("Electra", "electra", _encoder_heads(
        "", classification=replace(_DENSE, activation="gelu"), multiple_choice=_SUMMARY,
        masked_lm=_ELECTRA, causal_lm=replace(_ELECTRA, suffix="ForCausalLM"),
    )),
    "gpt2": ModelFamily("GPT2", "transformer", _DECODER | {
        "tagging": _TAGS, "causal_lm": replace(_LM, suffix="LMHeadModel"),
    }, "n_embd"),
    "gptj": ModelFamily("GPTJ", "transformer", _DECODER | {"causal_lm": replace(_LM, bias=True)}, "n_embd", tied=False),
    "llama": ModelFamily("Llama", "model", _DECODER | _SCORE | {
        "question_answering": replace(_SPAN, prefix="transformer"),
    }, tied=False),
    "mbart": ModelFamily("MBart", "model", _seq2seq_heads(_SPAN, zero=_BIAS), "d_model"),
    "mistral": ModelFamily("Mistral", "model", _DECODER | _SCORE, tied=False),
    "mt5": ModelFamily("MT5", "transformer", _T5, "d_model", tied=False),
    "plbart": ModelFamily("PLBart", "model", _seq2seq_heads(None, zero=_BIAS), "d_model"),
    "roberta": ModelFamily("Roberta", "roberta", _ROBERTAS),
    "t5": ModelFamily("T5", "transformer", _T5, "d_model"),
    "xlm-roberta": ModelFamily("XLMRoberta", "roberta", _ROBERTAS),
    "xmod": ModelFamily("Xmod", "roberta", {
        kind: head.suffix + _LANGUAGES for kind, head in _ROBERTAS.items() if isinstance(head, Standard)
    }),
}  # fmt: skip
"""By model type. A multilabel_classification head is found as classification."""

_LABELLED = {"num_labels": 2, "layers": 1, "activation_function": "tanh"}
_CLASSIFIER = {"num_labels": 2, "layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True}
_CAUSAL = {"layers": 1, "activation_function": None, "layer_norm": False, "bias": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "classification": _CLASSIFIER,
    "multilabel_classification": _CLASSIFIER,
    "multiple_choice": {"num_choices": 2, "layers": 2, "activation_function": "tanh", "use_pooler": False},
    "tagging": _LABELLED,
    "question_answering": _LABELLED,
    "masked_lm": {"layers": 2, "activation_function": "gelu", "layer_norm": True, "bias": True},
    "causal_lm": _CAUSAL,
    "seq2seq_lm": _CAUSAL,
}
"""The settings of a flexible head that decide what it computes, and what `load_adapter` takes where one is absent."""
