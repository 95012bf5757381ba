"""Every kind of data gives the same vocabulary: the unique ids of its flattened columns. Errors: test_refusals.py."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import (
    Array2D,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
    concatenate_datasets,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from pema_adapters.errors import VocabularyError
from pema_adapters.scanning import arrow, bitmap
from pema_adapters.scanning.bitmap import Bitmap, GrowingBitmap
from pema_adapters.scanning.scanner import scan
from pema_adapters.vocabulary import PartialVocabulary

V = 1_000
RAGGED = [[5, 3], [], [999, 3, 0], [41]]
SQUARE = [[5, 3], [999, 0], [41, 41]]
NESTED = [[[5, 3], [7]], [[999, 0]], [[41], [1, 2, 3]]]  # multiple choice


def unique(values):
    """Return the sorted ids of nested lists without None: the oracle."""
    flat, todo = set(), [values]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo.extend(value)
        elif value is not None:
            flat.add(int(value))
    return sorted(flat)


def ids_of(data, **options):
    return PartialVocabulary.from_dataset(data, vocab_size=V, **options).token_ids.tolist()


def rows_of(values):
    return [{"input_ids": row, "text": "x"} for row in values]


def typed(values, kind):
    return Dataset.from_dict({"input_ids": values}, features=Features({"input_ids": kind}))


class MapStyle(torch.utils.data.Dataset):
    """A map-style data set without `__iter__`, and without IndexError at the end."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows_of(RAGGED))


def padded(rows):
    return BatchEncoding({"input_ids": torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows])})


def unfinished_generator():
    for row in SQUARE:
        array = np.array(row)
        yield {"input_ids": array}
        array[:] = -1  # the scan must be done with a row when it asks for the next


dataset = Dataset.from_list(rows_of(RAGGED))
KINDS = {
    "Dataset": (lambda: dataset, RAGGED),
    "torch format": (lambda: dataset.with_format("torch", columns=["text"]), RAGGED),
    "numpy format": (lambda: dataset.with_format("numpy"), RAGGED),
    "arrow format": (lambda: dataset.with_format("arrow"), RAGGED),
    "pandas format": (lambda: dataset.with_format("pandas"), RAGGED),
    "transform": (lambda: Dataset.from_dict({"n": [5, 3]}).with_transform(lambda b: {"input_ids": [b["n"]]}), [5, 3]),
    "int8": (lambda: typed([[1, 127]], List(Value("int8"))), [1, 127]),
    "uint8": (lambda: typed([[1, 255]], List(Value("uint8"))), [1, 255]),
    "int16": (lambda: typed(RAGGED, List(Value("int16"))), RAGGED),
    "uint16": (lambda: typed(RAGGED, List(Value("uint16"))), RAGGED),
    "int32": (lambda: typed(RAGGED, List(Value("int32"))), RAGGED),
    "uint32": (lambda: typed(RAGGED, List(Value("uint32"))), RAGGED),
    "uint64": (lambda: typed(RAGGED, List(Value("uint64"))), RAGGED),
    "large list": (lambda: typed(RAGGED, LargeList(Value("int32"))), RAGGED),
    "fixed-size list": (lambda: typed(SQUARE, List(Value("int64"), length=2)), SQUARE),
    "nested list": (lambda: typed(NESTED, List(List(Value("int32")))), NESTED),
    "Array2D": (lambda: typed([SQUARE, SQUARE], Array2D((3, 2), "int32")), SQUARE),
    "Array2D, picked": (lambda: typed([SQUARE, [[1, 1]] * 3], Array2D((3, 2), "int32")).select([0, 0]), SQUARE),
    "one id a row": (lambda: typed([5, 9, None], Value("int64")), [5, 9]),
    "nulls": (lambda: typed([[5, None], None, [7]], List(Value("int64"))), [5, 7]),
    "nested nulls": (lambda: typed([[[5], None], None, [[None, 7]]], List(List(Value("int64")))), [5, 7]),
    "fixed-size nulls": (lambda: typed([[5, 6], None, [7, 8]], List(Value("int32"), length=2)), [5, 6, 7, 8]),
    "shuffled": (lambda: dataset.shuffle(seed=0), RAGGED),
    "selected": (lambda: dataset.select([3, 0, 0]), [RAGGED[3], RAGGED[0]]),
    "selected twice": (lambda: dataset.select([3, 0, 2]).select([2, 0]), [RAGGED[2], RAGGED[3]]),
    "slice": (lambda: dataset.select(range(2, 4)), RAGGED[2:]),
    "slice of a slice, picked": (lambda: dataset.select(range(1, 4)).select([2]), RAGGED[3:]),
    "filtered": (lambda: dataset.filter(lambda row: len(row["input_ids"]) > 2), RAGGED[2:3]),
    "concatenated": (lambda: concatenate_datasets([dataset, dataset.select([0])]), RAGGED),
    "DatasetDict": (lambda: DatasetDict(train=dataset.select([0]), test=dataset.select([2])), RAGGED[::2]),
    "dict of dicts of splits": (lambda: {"a": DatasetDict(train=dataset), "b": rows_of([[77]])}, [RAGGED, [77]]),
    "IterableDataset": (dataset.to_iterable_dataset, RAGGED),
    "IterableDataset, shuffled": (lambda: dataset.to_iterable_dataset().shuffle(seed=0), RAGGED),
    "IterableDataset, torch": (lambda: dataset.to_iterable_dataset().with_format("torch"), RAGGED),
    "IterableDataset, Array2D": (
        lambda: typed([SQUARE], Array2D((3, 2), "int32")).to_iterable_dataset(num_shards=1),
        SQUARE,
    ),
    "IterableDataset, untyped": (lambda: IterableDataset.from_generator(lambda: iter(rows_of(RAGGED))), RAGGED),
    "IterableDataset, mapped": (
        lambda: dataset.to_iterable_dataset().map(lambda row: {"input_ids": [*row["input_ids"], 8]}),
        [RAGGED, 8],
    ),
    "IterableDatasetDict": (lambda: IterableDatasetDict(train=dataset.to_iterable_dataset()), RAGGED),
    "list of Datasets": (lambda: [dataset.select([0]), dataset.select([2, 3])], RAGGED),
    "mixed list": (
        lambda: [DatasetDict(a=dataset), dataset.to_iterable_dataset(), rows_of([[77]]), *rows_of([[78]])],
        [RAGGED, [77, 78]],
    ),
    "list of dicts": (lambda: rows_of(RAGGED), RAGGED),
    "tuple of dicts": (lambda: tuple(rows_of(RAGGED)), RAGGED),
    "generator": (lambda: (row for row in rows_of(RAGGED)), RAGGED),
    "generator that reuses its rows": (unfinished_generator, SQUARE),
    "dict of ragged lists": (lambda: {"input_ids": RAGGED}, RAGGED),
    "one row": (lambda: {"input_ids": [5, 3]}, [5, 3]),
    "nested rows": (lambda: rows_of(NESTED), NESTED),
    "rows with None": (lambda: rows_of([[None, 5], None, [7, None], [None]]), [5, 7]),
    "tuples and ranges": (lambda: rows_of([(5, 6), range(3)]), [[5, 6], [0, 1, 2]]),
    "single ids": (lambda: rows_of([5, np.int32(6), np.uint8(7)]), [5, 6, 7]),
    "batches of arrays": (lambda: [{"input_ids": np.array(SQUARE, np.uint16)}], SQUARE),
    "big-endian arrays": (lambda: [{"input_ids": np.array(SQUARE, ">i4")}], SQUARE),
    "strided arrays": (lambda: [{"input_ids": np.array(SQUARE)[:, ::-1].T}], SQUARE),
    "ragged object arrays": (lambda: [{"input_ids": np.array([*map(np.array, RAGGED)], object)}], RAGGED),
    "batches of tensors": (lambda: [{"input_ids": torch.tensor(SQUARE)}], SQUARE),
    "lists of tensors": (lambda: [{"input_ids": [torch.tensor(row, dtype=torch.int64) for row in RAGGED]}], RAGGED),
    "BatchEncoding": (lambda: BatchEncoding({"input_ids": RAGGED}), RAGGED),
    "torch Dataset": (lambda: MapStyle(rows_of(RAGGED)), RAGGED),
    "torch IterableDataset": (Stream, RAGGED),
    "DataLoader": (lambda: DataLoader(SQUARE, batch_size=2, shuffle=True, collate_fn=padded), SQUARE),
    "dict of DataLoaders": (lambda: {"train": DataLoader(SQUARE, batch_size=2, collate_fn=padded)}, SQUARE),
    "no ids at all": (lambda: rows_of([[], []]), []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind):
    data, values = KINDS[kind]
    assert ids_of(data()) == unique(values)


@pytest.mark.filterwarnings("ignore:.* is read by one process")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_with_threads(kind, monkeypatch):
    """Slices and groups are as small as possible."""
    monkeypatch.setattr(arrow, "GROUP_BYTES", 1)
    monkeypatch.setattr(arrow, "SLICE_BYTES", 8)
    data, values = KINDS[kind]
    assert ids_of(data(), num_proc=3) == unique(values)


def test_data_without_random_access_warn_of_one_process():
    for data in (rows_of(RAGGED), dataset.to_iterable_dataset(), dataset.with_transform(lambda batch: batch)):
        with pytest.warns(UserWarning, match="is read by one process, not 2: it has no parts to share"):
            ids_of(data, num_proc=2)
    ids_of(dataset, num_proc=2)  # and no warning


@given(st.lists(st.lists(st.integers(0, V - 1))), st.lists(st.lists(st.integers(0, V - 1))))
def test_rows_and_columns_equal_the_oracle(inputs, targets):
    rows = [{"input_ids": a, "decoder_input_ids": b} for a, b in itertools.zip_longest(inputs, targets, fillvalue=[])]
    features = Features(dict.fromkeys(("input_ids", "decoder_input_ids"), List(Value("int32"))))
    in_arrow = Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
    assert ids_of(in_arrow) == unique([inputs, targets])
    assert ids_of(rows or in_arrow) == unique([inputs, targets])


@given(st.lists(st.lists(st.none() | st.integers(0, V - 1)) | st.none(), min_size=1), st.integers(1, 4))
def test_threads_equal_the_oracle(rows, num_proc):
    """The ids and the number of tokens are equal, with and without nulls."""
    data = typed(rows, List(Value("int32")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow, "GROUP_BYTES", 40)
        patch.setattr(arrow, "SLICE_BYTES", 20)
        found = scan(data, vocab_size=V, num_proc=num_proc)
    assert found.token_ids.tolist() == unique(rows)
    assert found.tokens == sum(token_id is not None for row in rows if row for token_id in row)


@given(st.data())
def test_selected_rows_equal_the_oracle(data):
    rows = data.draw(st.lists(st.lists(st.integers(0, V - 1), max_size=3), min_size=1, max_size=30))
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    chunks = [Dataset.from_dict({"input_ids": part}, features=INTS) for part in (rows[:7], rows[7:])]
    in_arrow = concatenate_datasets(chunks).select(picked)
    assert ids_of(in_arrow) == unique([rows[row] for row in picked])


INTS = Features({"input_ids": List(Value("int32"))})


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_blocks_equal_numpy(dtype, monkeypatch):
    monkeypatch.setattr(bitmap, "BLOCK_SIZE", 7)
    ids = np.random.default_rng(0).integers(0, 100, 50).astype(dtype)
    for marked in (Bitmap(100), GrowingBitmap(100)):
        assert marked.mark(ids, skip_negative=False) is None
        assert np.flatnonzero(marked.seen).tolist() == np.unique(ids).tolist()
        assert marked.tokens == 50


def test_nulls_are_skipped_in_slices(monkeypatch):
    monkeypatch.setattr(arrow, "COPY_ROWS", 2)
    values = [[1, None], None, [2], [], [3], None, [None, 4]]
    assert np.concatenate([*arrow.iterate_integers(pa.array(values))]).tolist() == [1, 2, 3, 4]
    assert ids_of(typed(values, List(Value("int64"))).select([6, 1, 0])) == [1, 4]


# ---- which columns


def test_labels_are_read_on_request_without_negative_ids():
    rows = [{"input_ids": [1, 2], "labels": [-100, 7]}, {"input_ids": [3], "labels": [-100]}]
    for data in (rows, Dataset.from_list(rows)):
        assert ids_of(data) == [1, 2, 3]
        assert ids_of(data, columns=("input_ids", "decoder_input_ids", "labels")) == [1, 2, 3, 7]
        assert ids_of(data, columns="labels") == [7]
    assert ids_of([{"my_labels": np.array([[-1, 4]])}], columns=["my_labels"]) == [4]


def test_columns_may_be_absent_in_some_splits():
    data = {"train": Dataset.from_dict({"input_ids": [[1]]}), "test": Dataset.from_dict({"decoder_input_ids": [[2]]})}
    assert ids_of(data) == [1, 2]
    assert ids_of([{"input_ids": [1]}, {"other": "x"}]) == [1]


@pytest.mark.parametrize("make", [list, iter, Dataset.from_list], ids=["list", "generator", "Dataset"])
def test_missing_columns_are_refused(make):
    rows = [{"text": "a b", "label": 0}]
    with pytest.raises(
        VocabularyError, match=r"no column 'input_ids', 'decoder_input_ids' anywhere.*'text', 'label'.*map"
    ):
        ids_of(make(rows))
    with pytest.raises(VocabularyError, match=r"no column 'labels' anywhere.*found: 'input_ids'"):
        ids_of(make([{"input_ids": [1]}]), columns=("input_ids", "labels"))
    with pytest.raises(VocabularyError, match="no column 'decoder_input_ids' anywhere"):
        ids_of(make([{"input_ids": [1]}]), columns=["decoder_input_ids"])
    assert ids_of(make([{"input_ids": [1]}]), columns=("input_ids", "labels"), optional=["labels"]) == [1]


def test_an_exhausted_generator_is_refused():
    rows = iter(rows_of(RAGGED))
    assert ids_of(rows) == unique(RAGGED)
    with pytest.raises(VocabularyError, match="no rows at all"):
        ids_of(rows)
