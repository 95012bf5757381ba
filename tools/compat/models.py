"""What tools/compatibility.py builds: every model type of adapters, tiny and at random, and every method's config.

V is prime, so that a tensor [V, d] is the embedding matrix and nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from adapters import ADAPTER_CONFIG_MAP, ConfigUnion
from torch import Tensor

from pema_adapters import PEMAConfig

V, D, LAYERS, HEADS = 251, 128, 2, 4
USED = [5, 8, 13, 21, 34, 55, 89, 144, 233]
"""What the training data use, beside the ids that a model inserts."""
UNUSED = [7, 100, 250]

ALONE = "pema alone"
_DEPRECATED = ("pfeiffer", "houlsby", "parallel", "scaled_parallel", "pfeiffer+inv", "houlsby+inv")
METHODS = (ALONE, *(name for name in ADAPTER_CONFIG_MAP if name not in (*_DEPRECATED, "pema")))


def adapter_config(method: str, *, pema: bool) -> Any:
    """The method as `ADAPTER_CONFIG_MAP` has it, with PEMA beside it or without; None for nothing at all."""
    if method == ALONE:
        return PEMAConfig() if pema else None
    config = ADAPTER_CONFIG_MAP[method]
    if not pema:
        return config
    parts = config.configs if isinstance(config, ConfigUnion) else [config]
    return ConfigUnion(PEMAConfig(), *parts)


AUTO_CLASSES = {
    "classification": transformers.AutoModelForSequenceClassification,
    "masked": transformers.AutoModelForMaskedLM,
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
}
LM_HEADS = ("masked", "causal", "seq2seq")


@dataclass(frozen=True)
class Family:
    """One model type: its config, the heads it has, and how it differs in what it is given.

    Args:
        config: makes the config.
        heads: language-model heads.
        classes: classes for heads (and for "bare", the model without one) that are not the Auto class's; None: there is
            none.
        has_classifier: whether there is a ...ForSequenceClassification; else a fixed linear layer sits on the states.
        decoder: whether the model is given decoder_input_ids too.
        sound: whether the encoder hears features instead of reading ids.
    """

    config: Callable[[], Any]
    heads: tuple[str, ...] = ()
    classes: Mapping[str, Any] = field(default_factory=dict)
    has_classifier: bool = True
    decoder: bool = False
    sound: bool = False

    def head_kinds(self) -> tuple[str, ...]:
        has_bare = self.has_classifier or self.classes.get("bare", transformers.AutoModel) is not None
        return ("classification", *self.heads) if has_bare else self.heads

    def model_class(self, head: str) -> Any:
        if head == "classification" and not self.has_classifier:
            return self.classes.get("bare", transformers.AutoModel)
        return self.classes.get(head, AUTO_CLASSES[head])

    def is_bare(self, head: str) -> bool:
        return head == "classification" and not self.has_classifier

    def inputs(self, config: Any, head: str, *, unseen: bool) -> dict[str, Tensor]:
        """Two rows, the second padded; `unseen`: with tokens outside the vocabulary."""
        ids = _ids(config, unseen)
        mask = (ids != config.pad_token_id).long()
        if self.sound:
            features = torch.randn(2, config.num_mel_bins, 32, generator=torch.Generator().manual_seed(5))
            return {"input_features": features, "decoder_input_ids": ids}
        given = {"input_ids": ids, "attention_mask": mask}
        if self.decoder and head != "classification":
            given["decoder_input_ids"] = ids.flip(1).contiguous()
        return given


def _ids(config: Any, unseen: bool) -> Tensor:
    first, second = list(USED[:4]), list(USED[4:6])
    if unseen:
        first[1], first[3], second[0] = UNUSED
    eos, pad = config.eos_token_id, config.pad_token_id
    return torch.tensor([[*first, eos], [*second, eos, pad, pad]])


def _encoder(name: str, **more: Any) -> Callable[[], Any]:
    sizes = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 2 * D}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 80}
    made = {"vocab_size": V, **sizes, **tokens, **more}
    return lambda: getattr(transformers, name)(**made)


def _like_roberta(name: str, **more: Any) -> Callable[[], Any]:
    return _encoder(name, pad_token_id=1, bos_token_id=0, **more)


def _grouped_query(name: str, **more: Any) -> Callable[[], Any]:
    return _encoder(name, num_key_value_heads=2, head_dim=D // HEADS, **more)


def _like_bart(name: str, **more: Any) -> Callable[[], Any]:
    sizes: dict[str, Any] = {"d_model": D, "vocab_size": V, "max_position_embeddings": 80}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": LAYERS, f"{part}_attention_heads": HEADS, f"{part}_ffn_dim": 2 * D}
    return lambda: getattr(transformers, name)(**sizes, **more)


def _like_t5(name: str) -> Callable[[], Any]:
    sizes = {"vocab_size": V, "d_model": D, "d_kv": D // HEADS, "d_ff": 2 * D, "num_layers": LAYERS}
    return lambda: getattr(transformers, name)(**sizes, num_heads=HEADS, decoder_start_token_id=0)


def _like_gpt(name: str, **more: Any) -> Callable[[], Any]:
    sizes = {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 80, "n_inner": 2 * D}
    return lambda: getattr(transformers, name)(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)


def _distilbert() -> Any:
    return transformers.DistilBertConfig(
        vocab_size=V, dim=D, hidden_dim=2 * D, n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=80,
        eos_token_id=2,
    )  # fmt: skip


def _encoder_decoder() -> Any:
    """The decoder has a vocabulary of its own, which PEMA leaves as it is."""
    decoder = _encoder("BertConfig", vocab_size=V + 8, is_decoder=True, add_cross_attention=True)
    parts = [_encoder("BertConfig")(), decoder()]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 2, 1
    return config


def _deberta(name: str, **more: Any) -> Callable[[], Any]:
    return _encoder(name, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_hidden_size=D, **more)


_BERT_LM, _GPT_LM, _BART_LM = ("masked",), ("causal",), ("seq2seq",)
_WHISPER = transformers.WhisperForConditionalGeneration

FAMILIES: dict[str, Family] = {
    "albert": Family(_encoder("AlbertConfig", embedding_size=64), _BERT_LM),
    "bart": Family(_like_bart("BartConfig"), _BART_LM, decoder=True),
    "bert": Family(_encoder("BertConfig"), _BERT_LM),
    "bert-generation": Family(
        _encoder("BertGenerationConfig", is_decoder=False), _GPT_LM, has_classifier=False,
        classes={"causal": transformers.BertGenerationDecoder, "bare": transformers.BertGenerationEncoder},
    ),
    "clip text": Family(
        _encoder("CLIPTextConfig"), has_classifier=False, classes={"bare": transformers.CLIPTextModel}
    ),
    "deberta": Family(_deberta("DebertaConfig"), _BERT_LM),
    "deberta-v2": Family(_deberta("DebertaV2Config", position_biased_input=False, type_vocab_size=0), _BERT_LM),
    "distilbert": Family(_distilbert, _BERT_LM),
    "electra": Family(_encoder("ElectraConfig", embedding_size=64), _BERT_LM),
    "encoder-decoder": Family(
        _encoder_decoder, _BART_LM, has_classifier=False, decoder=True,
        classes={"bare": None, "seq2seq": transformers.EncoderDecoderModel},
    ),
    "gpt2": Family(_like_gpt("GPT2Config"), _GPT_LM),
    "gptj": Family(_like_gpt("GPTJConfig", rotary_dim=8), _GPT_LM),
    "llama": Family(_encoder("LlamaConfig"), _GPT_LM),
    "mbart": Family(_like_bart("MBartConfig"), _BART_LM, decoder=True),
    "mistral": Family(_grouped_query("MistralConfig"), _GPT_LM),
    "mt5": Family(_like_t5("MT5Config"), _BART_LM, decoder=True),
    "plbart": Family(_like_bart("PLBartConfig"), _BART_LM, decoder=True),
    "roberta": Family(_like_roberta("RobertaConfig"), _BERT_LM),
    "t5": Family(_like_t5("T5Config"), _BART_LM, decoder=True),
    "whisper": Family(
        _like_bart("WhisperConfig", max_source_positions=16, max_target_positions=80, num_mel_bins=8, pad_token_id=0,
                   bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
                   begin_suppress_tokens=None),
        _BART_LM, has_classifier=False, decoder=True, sound=True, classes={"seq2seq": _WHISPER},
    ),
    "xlm-roberta": Family(_like_roberta("XLMRobertaConfig"), _BERT_LM),
    "xmod": Family(
        _like_roberta("XmodConfig", languages=["en_XX", "de_DE"], default_language="en_XX"), _BERT_LM
    ),
    "modernbert": Family(
        _encoder("ModernBertConfig", cls_token_id=1, sep_token_id=2, reference_compile=False), _BERT_LM
    ),
    "gemma2": Family(_grouped_query("Gemma2Config", query_pre_attn_scalar=D // HEADS), _GPT_LM),
    "gemma3_text": Family(
        _grouped_query("Gemma3TextConfig", query_pre_attn_scalar=D // HEADS), _GPT_LM,
        classes={"classification": transformers.Gemma3TextForSequenceClassification},
    ),
    "qwen2": Family(_grouped_query("Qwen2Config"), _GPT_LM),
    "qwen3": Family(_grouped_query("Qwen3Config"), _GPT_LM),
    "phi": Family(_encoder("PhiConfig", num_key_value_heads=HEADS), _GPT_LM),
}  # fmt: skip

WITHOUT_TEXT: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTModel(_vision("ViTConfig")),
    "beit": lambda: transformers.BeitModel(_vision("BeitConfig")),
}
"""Models that PEMA has nothing to do with."""


def _vision(name: str) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return getattr(transformers, name)(**sizes, image_size=32)
