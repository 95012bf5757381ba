"""Loading and saving never allocate the full matrix: RssAnon, sampled in a separate process."""

import pytest

from tests.anonymous_memory import printed_by

MATRIX_MB, LOADED_MB = 256, 128
PROGRAM = """
import torch
from transformers import BertConfig, BertForSequenceClassification
from pema_adapters import PartialVocabulary, load_model
from tests.anonymous_memory import watched

folder, rows, dim = {folder!r}, {rows}, 128
config = BertConfig(vocab_size=rows, hidden_size=dim, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
BertForSequenceClassification(config).save_pretrained(folder + "/base")
model = load_model(BertForSequenceClassification, folder + "/base", PartialVocabulary(range(100), rows))
model.get_input_embeddings().weight.data += 1
with watched() as growth:
    model.save_pretrained(folder + "/saved")
saved = BertForSequenceClassification.from_pretrained(folder + "/saved").get_input_embeddings().weight
base = BertForSequenceClassification.from_pretrained(folder + "/base").get_input_embeddings().weight
assert saved.shape == (rows, dim) and torch.equal(saved[100:], base[100:]) and torch.equal(saved[:100], base[:100] + 1)
print(growth())
"""


@pytest.mark.slow
def test_save_pretrained_grows_by_less_than_half_the_matrix(tmp_path):
    program = PROGRAM.format(folder=str(tmp_path), rows=MATRIX_MB * 2**20 // (128 * 4))
    assert printed_by(program) < MATRIX_MB / 2


LOADING = """
import torch
from transformers import BertConfig, BertModel
from pema_adapters import PartialVocabulary, load_model
from tests.anonymous_memory import watched

folder, rows = {folder!r}, {rows}
config = BertConfig(vocab_size=rows, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
saved = BertModel(config)
for name, how in {{"safe": {{}}, "bin": {{"safe_serialization": False}}}}.items():
    saved.save_pretrained(folder + "/" + name, **how)
del saved
load = lambda name, dtype: load_model(BertModel, folder + "/" + name, PartialVocabulary(range(100), rows), dtype=dtype)
load("safe", torch.float32)  # imports
with watched() as growth:
    for name in ("safe", "bin"):
        for dtype in (torch.float32, torch.bfloat16):
            assert load(name, dtype).dtype == dtype
print(growth())
"""


@pytest.mark.slow
def test_loading_grows_by_less_than_a_quarter_of_the_matrix(tmp_path):
    program = LOADING.format(folder=str(tmp_path), rows=LOADED_MB * 2**20 // (128 * 4))
    assert printed_by(program) < LOADED_MB / 4
