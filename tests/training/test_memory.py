"""Saving a shrunk model never holds the matrix in memory of its own: RssAnon, sampled in a process of its own."""

import subprocess
import sys

MATRIX_MB = 256
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


def test_save_pretrained_grows_by_less_than_half_the_matrix(tmp_path):
    program = PROGRAM.format(folder=str(tmp_path), rows=MATRIX_MB * 2**20 // (128 * 4))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < MATRIX_MB / 2
