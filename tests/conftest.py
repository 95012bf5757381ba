"""A checkpoint on disk and data to train on, for every test that wants them."""

import pytest
import torch

from tests.hub.fixture import hub  # noqa: F401 - a fixture for every test
from tests.models import CONFIGS, HEADS, USED, Case


@pytest.fixture
def make_case(tmp_path):
    def make(family="bert", head="classification"):
        torch.manual_seed(3)
        model = HEADS[head].from_config(CONFIGS[family]())
        folder = tmp_path / f"base-{family}-{head}"
        model.save_pretrained(folder)
        return Case(str(folder), HEADS[head])

    return make


@pytest.fixture
def case(make_case):
    return make_case()


@pytest.fixture
def data():
    """Rows as a tokenizer would give them, of one length, with a label."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor(USED)[torch.randint(len(USED), (24, 7), generator=generator)]
    rows = {
        "input_ids": ids.tolist(),
        "attention_mask": torch.ones_like(ids).tolist(),
        "labels": [i % 2 for i in range(24)],
    }
    return Dataset.from_dict(rows)
