"""A model of XLM-R-base's shape with random weights, and a vocabulary for it."""

from typing import Any

import numpy as np
import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

INSERTED = (0, 1, 2)
"""Ids of the tokens that the tokenizer adds to every text."""


def choose_token_ids(vocab_size: int, rows: int) -> np.ndarray[Any, Any]:
    """Return K of V token ids, sorted [K], the inserted ones among them."""
    others = np.arange(len(INSERTED), vocab_size)
    chosen = np.random.default_rng(0).choice(others, rows - len(INSERTED), replace=False)
    return np.sort(np.concatenate([INSERTED, chosen]))


def make_model(rows: int, layers: int) -> Any:
    """Return a model for sequence classification, ready to train."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=rows, num_hidden_layers=layers, max_position_embeddings=514, type_vocab_size=1,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return XLMRobertaForSequenceClassification(config).train()
