"""Repositories on the Hub of these tests, and a model trained on one of them."""

import adapters
from transformers import AutoModelForSequenceClassification

from pema_adapters import PartialVocabulary, shrink_embeddings
from tests.models import USED, V
from tests.training.test_shrink import perturb

BASE_CARD = "---\nlicense: mit\nlanguage:\n- en\ntags:\n- other\n---\n\n# The base\n"
BASE, ADAPTER, MERGED = "someone/base", "someone/adapter", "team/merged"


def trained(where, config):
    model = AutoModelForSequenceClassification.from_pretrained(where)
    adapters.init(model)
    model.add_adapter("task", config=config)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    perturb(model)
    return model
