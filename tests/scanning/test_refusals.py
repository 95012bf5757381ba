"""Errors of a scan say where and why; a scan does not change the caller's data. Kinds of data: test_scanner.py."""

import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import DataLoader

from pema_adapters.errors import VocabularyError
from pema_adapters.scanning import arrow
from pema_adapters.scanning.scanner import scan
from pema_adapters.vocabulary import PartialVocabulary
from tests.scanning.test_scanner import RAGGED, SQUARE, V, dataset, ids_of, padded, rows_of

WRONG = [[1], [2, 3], [4, 1000, -7]]
REFUSED = {
    "Dataset": (lambda: Dataset.from_dict({"input_ids": WRONG}), "column 'input_ids', row 2: token id 1000 is"),
    "split": (
        lambda: DatasetDict(test=Dataset.from_dict({"input_ids": WRONG})),
        "split 'test', column 'input_ids', row 2: token id 1000 is outside the embedding, whose V = 1,000 rows are "
        "0 to 999; was the text tokenized with another model's tokenizer, or were tokens added without "
        "model.resize_token_embeddings(len(tokenizer))?",
    ),
    "shuffled": (lambda: Dataset.from_dict({"input_ids": WRONG}).select([0, 2, 1]), "row 1: token id 1000 is"),
    "picked": (lambda: Dataset.from_dict({"input_ids": WRONG}).select([2, 2]), "row 0: token id 1000 is"),
    "second chunk": (
        lambda: concatenate_datasets([Dataset.from_dict({"input_ids": part}) for part in (WRONG[:2], WRONG)]),
        "row 4: token id 1000 is",
    ),
    "stream": (
        lambda: Dataset.from_dict({"input_ids": [[1]] * 1001 + WRONG}).to_iterable_dataset(),
        "row 1003: token id 1000 is",
    ),
    "transform": (
        lambda: Dataset.from_dict({"n": [[1]] * 1000 + WRONG}).with_transform(lambda b: {"input_ids": b["n"]}),
        "row 1002: token id 1000 is",
    ),
    "list of splits": (
        lambda: [rows_of([[1]]), {"a": rows_of(WRONG)}],
        "data[1], split 'a', column 'input_ids', row 2: token id 1000 is",
    ),
    "rows": (lambda: rows_of(WRONG), "column 'input_ids', row 2: token id 1000 is"),
    "batches": (
        lambda: [{"input_ids": np.array([[1, 2]])}, {"input_ids": torch.tensor([[1, 2], [3, 1000]])}],
        "column 'input_ids', item 1, row 1 of it: token id 1000 is",
    ),
    "one batch": (lambda: {"input_ids": WRONG}, "column 'input_ids', row 2: token id 1000 is"),
    "negative": (lambda: rows_of([[1], [-100]]), "row 1: token id -100 is outside"),
    "labels too large": (lambda: [{"input_ids": [1], "labels": [-100, 1000]}], "'labels', row 0: token id 1000 is"),
    "huge": (lambda: rows_of([[2**70]]), "row 0: token id 9223372036854775807 is"),
    "huge, unsigned": (lambda: [{"labels": np.array([2**63], np.uint64)}], "token id 9223372036854775807 is"),
    "floats": (lambda: rows_of([[1.5]]), "row 0: found a float ('1.5'), expected token ids, which are integers"),
    "mixed floats": (lambda: rows_of([[1, 1.5]]), "found a float ('1.5')"),
    "text": (lambda: rows_of(["ab"]), "found a str ('ab')"),
    "words": (lambda: rows_of([["ab"]]), "found a str ('ab')"),
    "booleans": (lambda: [{"input_ids": np.array([True])}], "found bool values"),
    "float arrays": (lambda: [{"input_ids": np.array([1.0])}], "found float64 values"),
    "float tensors": (lambda: [{"input_ids": torch.ones(1, dtype=torch.bfloat16)}], "found torch.bfloat16 values"),
    "Arrow text": (lambda: Dataset.from_dict({"input_ids": ["ab"]}), "column 'input_ids': found type string"),
    "Arrow floats": (lambda: Dataset.from_dict({"input_ids": [[1.5]]}), "found type list<item: double>"),
    "a path": (lambda: "train.jsonl", "data: found a str ('train.jsonl'), expected a data set"),
    "lists of ids": (lambda: RAGGED, "data[0][0]: found a int ('5')"),
    "tuple batches": (lambda: [(torch.tensor([1]), torch.tensor([2]))], "data[0][0]: found a Tensor"),
    "None": (lambda: None, "data: found a NoneType"),
}


@pytest.mark.filterwarnings("ignore:.* is read by one process")
@pytest.mark.parametrize("num_proc", [1, 3])
@pytest.mark.parametrize("kind", REFUSED)
def test_errors_name_split_column_and_row(kind, num_proc, monkeypatch):
    monkeypatch.setattr(arrow, "GROUP_BYTES", 1)
    monkeypatch.setattr(arrow, "SLICE_BYTES", 16)
    data, message = REFUSED[kind]
    options = {"columns": ("input_ids", "decoder_input_ids", "labels"), "optional": ["labels"], "num_proc": num_proc}
    with pytest.raises(VocabularyError, match=re.escape(message)) as caught:
        ids_of(data(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_proc", [1, 2, 5])
def test_the_first_invalid_row_is_named_with_any_num_proc(num_proc, monkeypatch):
    monkeypatch.setattr(arrow, "GROUP_BYTES", 64)
    monkeypatch.setattr(arrow, "SLICE_BYTES", 32)
    rows = [[1, 2]] * 100
    rows[77], rows[41], rows[40] = [1003], [1002, -1], [3, 1001]
    for data, row in ((Dataset.from_dict({"input_ids": rows}), 40), (Dataset.from_dict({"input_ids": rows[::-1]}), 22)):
        wrong = rows[row] if row == 40 else [1003]
        with pytest.raises(VocabularyError, match=f"row {row}: token id {wrong[-1]} is outside"):
            ids_of(data, num_proc=num_proc)


def test_invalid_num_proc_is_refused():
    for wrong in (0, -1, "two", 1.5):
        with pytest.raises(VocabularyError, match=re.escape(f"num_proc is {wrong!r}, expected an integer from 1")):
            ids_of(dataset, num_proc=wrong)


def test_the_error_for_negative_ids_says_what_to_do():
    with pytest.raises(VocabularyError, match="skipped only in columns that end in 'labels'"):
        ids_of(rows_of([[-100]]))


def test_invalid_vocab_size_is_refused():
    with pytest.raises(VocabularyError, match="vocab_size is None"):
        PartialVocabulary.from_dataset(dataset, vocab_size=None)


# ---- the caller's data do not change


def test_formats_and_rows_are_not_changed():
    data = Dataset.from_list(rows_of(RAGGED)).with_format("torch", columns=["input_ids"])
    before, rows = data.format, rows_of(RAGGED)
    ids_of(data)
    ids_of(rows)
    assert data.format == before
    assert rows == rows_of(RAGGED)


@pytest.mark.parametrize("own", [None, 3])
def test_the_random_state_is_not_changed(own):
    """Scanning the loader of a training run does not change that run."""
    generator = None if own is None else torch.Generator().manual_seed(own)

    def numbers(scanned):
        torch.manual_seed(0)
        if own is not None:
            generator.manual_seed(own)
        loader = DataLoader(SQUARE * 5, batch_size=2, shuffle=True, collate_fn=padded, generator=generator)
        if scanned:
            ids_of(loader)
        return torch.rand(3).tolist(), [batch["input_ids"].tolist() for batch in loader]

    assert numbers(scanned=True) == numbers(scanned=False)


def test_tokens_are_counted():
    assert scan(dataset, vocab_size=V).tokens == sum(map(len, RAGGED))
    assert scan(rows_of(RAGGED), vocab_size=V).tokens == sum(map(len, RAGGED))
    assert scan(dataset, vocab_size=V).columns == ("input_ids",)


# ---- the progress bar


@pytest.mark.parametrize(
    ("progress", "switch", "shown"), [(True, "0", True), (None, "0", False), (False, "0", False), (True, "1", False)]
)
def test_progress_bar_appears_only_when_asked_and_on_long_scans(progress, switch, shown, monkeypatch, capfd):
    """Here stderr is not a terminal: the bar appears only on request, and never on short scans."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", switch)
    ids_of(rows_of(RAGGED), progress=progress)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("pema_adapters.scanning.progress.SECONDS_BEFORE_BAR", 0)
    ids_of(dataset, progress=progress)
    err = capfd.readouterr().err
    assert ("4.00/4.00" in err) == shown
    assert ("tokens/s, K = 5]" in err) == shown
