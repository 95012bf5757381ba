"""Every family of language models whose head is tied to its input embedding, as tiny configs without dropout."""

import torch
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    CamembertConfig,
    Cohere2Config,
    CohereConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    M2M100Config,
    MambaConfig,
    MBartConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    MT5Config,
    Olmo2Config,
    OPTConfig,
    PegasusConfig,
    Phi3Config,
    PhiConfig,
    PLBartConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    T5Config,
    XLMConfig,
    XLMRobertaConfig,
    XmodConfig,
)  # fmt: skip

V = 211
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GROUPED = {
    **SMALL,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
WIDTHS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip
T5_WIDTHS = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
NARROW = {**SMALL, "embedding_size": 16}

MASKED = {
    "albert": (AlbertConfig, NARROW),
    "bert": (BertConfig, SMALL),
    "camembert": (CamembertConfig, SMALL),
    "deberta": (DebertaConfig, SMALL),
    "deberta-v2": (DebertaV2Config, SMALL),
    "distilbert": (DistilBertConfig, {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}),
    "electra": (ElectraConfig, NARROW),
    "modernbert": (ModernBertConfig, {**SMALL, "pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 1, "sep_token_id": 1}),
    "mpnet": (MPNetConfig, SMALL),
    "roberta": (RobertaConfig, SMALL),
    "xlm": (XLMConfig, {"emb_dim": 32, "n_layers": 2, "n_heads": 2}),
    "xlm-roberta": (XLMRobertaConfig, SMALL),
    "xmod": (XmodConfig, {**SMALL, "languages": ["en"], "default_language": "en"}),
}  # fmt: skip
CAUSAL = {
    "bert-causal": (BertConfig, {**SMALL, "is_decoder": True}),
    "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "cohere": (CohereConfig, GROUPED),
    "cohere2": (Cohere2Config, GROUPED),
    "falcon": (FalconConfig, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "gemma": (GemmaConfig, {**GROUPED, "head_dim": 16}),
    "gemma2": (Gemma2Config, {**GROUPED, "head_dim": 16}),
    "gemma3": (Gemma3TextConfig, {**GROUPED, "head_dim": 16, "final_logit_softcapping": 30.0}),
    "gpt-neo": (GPTNeoConfig, {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
                               "bos_token_id": 0, "eos_token_id": 0}),
    "gpt-neox": (GPTNeoXConfig, {**SMALL, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}),
    "gpt2": (GPT2Config, GPT),
    "gptj": (GPTJConfig, {**GPT, "rotary_dim": 8}),
    "granite": (GraniteConfig, {**GROUPED, "logits_scaling": 4.0}),
    "llama": (LlamaConfig, GROUPED),
    "mamba": (MambaConfig, {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, GROUPED),
    "olmo2": (Olmo2Config, GROUPED),
    "opt": (OPTConfig, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": (PhiConfig, GROUPED),
    "phi3": (Phi3Config, GROUPED),
    "qwen2": (Qwen2Config, GROUPED),
    "qwen3": (Qwen3Config, {**GROUPED, "head_dim": 16}),
    "smollm3": (SmolLM3Config, GROUPED),
    "stablelm": (StableLmConfig, GROUPED),
    "starcoder2": (Starcoder2Config, GROUPED),
}  # fmt: skip
SEQ2SEQ = {
    "bart": (BartConfig, WIDTHS),
    "m2m100": (M2M100Config, WIDTHS),
    "mbart": (MBartConfig, WIDTHS),
    "mt5": (MT5Config, {**T5_WIDTHS, "tie_word_embeddings": True}),
    "pegasus": (PegasusConfig, WIDTHS),
    "plbart": (PLBartConfig, WIDTHS),
    "t5": (T5Config, T5_WIDTHS),
}
FAMILIES = {
    **{name: (AutoModelForMaskedLM, *made) for name, made in MASKED.items()},
    **{name: (AutoModelForCausalLM, *made) for name, made in CAUSAL.items()},
    **{name: (AutoModelForSeq2SeqLM, *made) for name, made in SEQ2SEQ.items()},
}

IDS = torch.tensor([[3, 5, 8, 13, 21], [21, 34, 55, 89, 100]])
LABELS = torch.tensor([[3, -100, 8, 200, 21], [21, 34, 150, -100, 100]])
"""With tokens that the inputs lack, and ignored positions."""
USED = sorted(set(IDS.flatten().tolist()))


def save_base(name, folder):
    """Save a model with random weights, biases and norms included. Returns its Auto class."""
    auto_class, config_class, options = FAMILIES[name]
    config = config_class(vocab_size=V, **options)
    for field in vars(config):
        if "drop" in field and isinstance(getattr(config, field), float):
            setattr(config, field, 0.0)
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 10)
    model.double().save_pretrained(folder)
    return auto_class
