"""What the recipes run on in tests: a few words, rows of them, and a setting."""

import gzip

from glue import GLUE
from runs.training import Setting

WORDS = ["good", "bad", "film", "book", "very", "quite", "the", "a", "was", "is"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
V = 40
"""Rows of the matrix, most of which no text uses."""
BY_NAME = GLUE.tasks
SETTING = Setting(
    base="", method="Full fine-tuning", pema="off", seed=0, learning_rate=1e-2, batch_size=8, epochs=2, max_length=16,
    warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=0.0, train_rows=0, bf16=False, group_by_length=False,
)  # fmt: skip


def lines(labels, pairs, labelled):
    """40 rows: whether they have "good" decides the label; a quotation mark is a letter."""
    header = ["sentence1", "sentence2"] if pairs else ["sentence"]
    yield [*header, *(["label"] if labelled else [])]
    for number in range(40):
        text = f'the {WORDS[2 + number % 2]} was "{WORDS[4 + number % 2]} {WORDS[number // 2 % 2]}'
        label = number / 40 if labels == 1 else number // 2 % 2
        yield [text, *(["a film"] if pairs else []), *([label] if labelled else [])]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines("\t".join(map(str, row)) + "\n" for row in rows)
