"""Tiny models of every family, saved as checkpoints and loaded as users load them."""

import copy
from dataclasses import dataclass

import adapters
import torch
from transformers import (
    AlbertConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)  # fmt: skip

V = 120
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "hidden_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = {
    "classification": AutoModelForSequenceClassification,
    "tagging": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
}


def bert_like(config_class, **changes):
    return config_class(vocab_size=V, max_position_embeddings=40, **{**SMALL, **NO_DROPOUT, **changes})


CONFIGS = {
    "bert": lambda: bert_like(BertConfig),
    "roberta": lambda: bert_like(RobertaConfig, pad_token_id=1),
    "xlm-roberta": lambda: bert_like(XLMRobertaConfig, pad_token_id=1),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=V, dim=32, hidden_dim=48, n_layers=2, n_heads=2, max_position_embeddings=40,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, qa_dropout=0.0,
    ),
    "deberta-v2": lambda: bert_like(
        DebertaV2Config, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
        type_vocab_size=0, pooler_dropout=0.0, pooler_hidden_size=32,
    ),
    "electra": lambda: bert_like(ElectraConfig, embedding_size=16),
    "albert": lambda: bert_like(AlbertConfig, embedding_size=16, classifier_dropout_prob=0.0),
}  # fmt: skip

USED = [3, 5, 8, 13, 21, 34, 55, 89, 118]
"""Token ids that the training data use; all others are unseen."""


@dataclass
class Case:
    """A checkpoint on disk, and models loaded from it."""

    folder: str
    auto_class: type

    def plain(self):
        torch.manual_seed(7)
        return self.auto_class.from_pretrained(self.folder)

    def with_adapters(self):
        model = self.plain()
        adapters.init(model)
        return model


def batch(ids, labels=None):
    ids = torch.tensor(ids)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return made if labels is None else {**made, "labels": torch.tensor(labels)}


SEEN = batch([[3, 5, 8, 13], [21, 34, 55, 89]])
MIXED = batch([[3, 4, 8, 99], [21, 119, 55, 2]])


def outputs(model, inputs):
    """All float outputs of a model in evaluation mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**inputs)
    model.train(was_training)
    return [value for value in out.to_tuple() if torch.is_tensor(value)]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def matrix_of(model):
    return model.get_input_embeddings().weight


def with_rows(model, token_ids, rows):
    """A copy of a full model with rows written into E: the oracle for outputs."""
    full = copy.deepcopy(model)
    with torch.no_grad():
        matrix_of(full)[torch.as_tensor(token_ids).long()] = rows
    return full


def live_tensors_of_shape(shape):
    import gc

    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and tuple(t.shape) == tuple(shape)]


def perturb_trained(model):
    """Add noise to every parameter that trains, in place of training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
