"""The models of the PEMA paper: whose tokenizer they use, and how many parameters they have.

Parameters are counted on the meta device, from configs with the hyperparameters that the models are published with;
nothing is downloaded. N is that of the model with a head for classification, as in the paper.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1}
DEBERTA_V3 = {
    "vocab_size": 128_100,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}


@dataclass(frozen=True)
class Size:
    """V rows of d in the embedding, and N parameters in all."""

    rows: int
    width: int
    total: int

    @property
    def embedding(self) -> int:
        return self.rows * self.width


class Model:
    """A model of the paper: the folder name of its tokenizer, and its config."""

    def __init__(self, tokenizer: str, config: Any) -> None:
        self.tokenizer, self.config = tokenizer, config

    @property
    def rows(self) -> int:
        """V."""
        return int(self.config.vocab_size)

    @cached_property
    def size(self) -> Size:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(self.config)
        return Size(*model.get_input_embeddings().weight.shape, model.num_parameters())


def _deberta(layers: int, heads: int, width: int) -> Model:
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width}
    return Model("deberta-v3-base", DebertaV2Config(**DEBERTA_V3, **shape, intermediate_size=4 * width))


MODELS = {
    "DistilBERT": Model("bert-base-uncased", DistilBertConfig(vocab_size=30_522)),
    "DistilRoBERTa": Model("roberta-base", RobertaConfig(vocab_size=50_265, num_hidden_layers=6, **ROBERTA)),
    "DistilmBERT": Model("bert-base-multilingual-cased", DistilBertConfig(vocab_size=119_547)),
    "BERT": Model("bert-base-uncased", BertConfig(vocab_size=30_522)),
    "RoBERTa": Model("roberta-base", RobertaConfig(vocab_size=50_265, **ROBERTA)),
    "DeBERTaV3": _deberta(12, 12, 768),
    "mBERT": Model("bert-base-multilingual-cased", BertConfig(vocab_size=119_547)),
    "XLM-RoBERTa": Model("xlm-roberta-base", XLMRobertaConfig(vocab_size=250_002, **ROBERTA)),
    "XLM-V": Model("xlm-v-base", XLMRobertaConfig(vocab_size=901_629, **ROBERTA)),
    "XSmall": _deberta(12, 6, 384),
    "Small": _deberta(6, 12, 768),
    "Base": _deberta(12, 12, 768),
    "Large": _deberta(24, 16, 1024),
}
"""By the rows of the paper's tables; the DeBERTaV3 sizes have one tokenizer, distilled models that of their teacher."""
CASED = {
    "DistilBERT": Model("bert-base-cased", DistilBertConfig(vocab_size=28_996)),
    "BERT": Model("bert-base-cased", BertConfig(vocab_size=28_996)),
}
"""What the paper's Table 5 lists in their place; its Table 2 has the uncased models' figures."""


def model_of(table: int, row: str) -> Model:
    return CASED.get(row, MODELS[row]) if table == 5 else MODELS[row]
