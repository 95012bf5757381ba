"""PartialVocabulary is a sorted set of ids with a V; its file is validated when read."""

import copy
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pema_adapters.errors import FormatError, VocabularyError
from pema_adapters.vocabulary import PartialVocabulary
from tests.paths import REPOSITORY

V = 100
IDS = st.lists(st.integers(0, V - 1))


@given(IDS)
def test_ids_are_sorted_and_unique(ids):
    vocabulary = PartialVocabulary(ids, V)
    assert vocabulary.token_ids.dtype == np.int32
    assert vocabulary.token_ids.tolist() == sorted(set(ids)) == list(vocabulary)
    assert len(vocabulary) == len(set(ids))
    assert vocabulary.reduction == 1 - len(set(ids)) / V
    assert [token_id in vocabulary for token_id in range(V)] == [token_id in ids for token_id in range(V)]


@pytest.mark.parametrize(
    "ids",
    [
        [7, 3, 3],
        (7, 3),
        {3, 7},
        iter([3, 7]),
        np.array([[7, 3]], np.uint8),
        torch.tensor([7, 3]),
        np.array([3, 7], ">i8"),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_may_be_of_any_kind(ids):
    assert PartialVocabulary(ids, V).token_ids.tolist() == [3, 7]


@given(IDS, IDS)
def test_union_holds_the_ids_of_both(left, right):
    assert PartialVocabulary(left, V) | PartialVocabulary(right, V) == PartialVocabulary(left + right, V)


def test_union_of_different_sizes_is_refused():
    with pytest.raises(VocabularyError, match=r"V = 100 on the left, 50,265 on the right"):
        _ = PartialVocabulary([1], V) | PartialVocabulary([1], 50_265)
    with pytest.raises(TypeError):
        _ = PartialVocabulary([1], V) | {1}


def test_equality_hash_and_membership():
    one = PartialVocabulary([5, 1], V)
    assert one == PartialVocabulary([1, 5], V)
    assert hash(one) == hash(PartialVocabulary([1, 5], V))
    assert one != PartialVocabulary([1, 5], V + 1)
    assert one != PartialVocabulary([1], V)
    assert one != [1, 5]
    assert "5" not in one
    assert 5.0 not in one
    assert np.int64(5) in one


def test_repr():
    assert repr(PartialVocabulary(range(5_534), 250_002)) == "PartialVocabulary(5,534 of 250,002 rows, 97.8% less)"


@pytest.mark.parametrize("copied", [lambda v: v, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_a_vocabulary_is_immutable(copied):
    given_ids = np.array([1, 2], np.int32)
    vocabulary = copied(PartialVocabulary(given_ids, V))
    given_ids[0] = 9
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.token_ids[0] = 9
    with pytest.raises(AttributeError):
        vocabulary.vocab_size = 3
    assert vocabulary == PartialVocabulary([1, 2], V)


@pytest.mark.parametrize(
    ("ids", "vocab_size", "message"),
    [
        ([3, 100], V, "token id 100 is outside the embedding, whose V = 100 rows are 0 to 99"),
        ([3, -1], V, "token id -1 is outside"),
        ([2**40], V, f"token id {2**40} is outside"),
        ([0.5], V, r"found token ids of type float64, expected integers \(first: .*0.5"),
        (["a"], V, "found token ids of type <U1, expected integers"),
        ([True], V, "found token ids of type bool, expected integers"),
        ([0], 0, "vocab_size is 0, expected an integer from 1"),
        ([0], 2**31 + 1, "vocab_size is 2147483649"),
        ([0], 10.0, "vocab_size is 10.0"),
    ],
)
def test_invalid_ids_and_sizes_are_refused(ids, vocab_size, message):
    with pytest.raises(VocabularyError, match=message):
        PartialVocabulary(ids, vocab_size)


@settings(deadline=None)  # it writes files, which wait for the disk
@given(ids=IDS)
def test_save_and_load_round_trip(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("vocabulary") / "x.vocabulary"
    vocabulary = PartialVocabulary(ids, V)
    vocabulary.save(path)
    assert PartialVocabulary.load(str(path)) == vocabulary
    assert load_file(path)["token_ids"].tolist() == sorted(set(ids))


def test_saved_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        PartialVocabulary([1], V).save(tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    old = PartialVocabulary([1], V)
    old.save(tmp_path / "x")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        PartialVocabulary([2], V).save(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert PartialVocabulary.load(tmp_path / "x") == old


GOOD = {"format": "pema-vocabulary", "vocab_size": "100"}
DAMAGED = {
    "unsorted": ({"token_ids": np.array([2, 1], np.int32)}, GOOD, "token_ids do not increase"),
    "repeated": ({"token_ids": np.array([1, 1], np.int32)}, GOOD, "token_ids do not increase"),
    "too-large": ({"token_ids": np.array([1, 100], np.int32)}, GOOD, "damaged.*token id 100 is outside"),
    "negative": ({"token_ids": np.array([-1, 1], np.int32)}, GOOD, "damaged.*token id -1 is outside"),
    "wide": ({"token_ids": np.array([1], np.int64)}, GOOD, r"token_ids is int64 \[1\], expected int32 \[K\]"),
    "flat-no-more": ({"token_ids": np.array([[1]], np.int32)}, GOOD, r"token_ids is int32 \[1, 1\]"),
    "no-size": ({"token_ids": np.array([1], np.int32)}, {"format": "pema-vocabulary"}, "vocab_size is ''"),
    "zero-size": ({"token_ids": np.array([0], np.int32)}, GOOD | {"vocab_size": "0"}, "vocab_size is 0"),
    "other-file": ({"a.weight": np.zeros(2)}, {}, r"not a vocabulary file: found the tensors a.weight .*None"),
    "other-format": ({"token_ids": np.array([1], np.int32)}, {"format": "pt"}, "not a vocabulary file.*'pt'"),
}


@pytest.mark.parametrize("defect", DAMAGED)
def test_damaged_files_are_refused(tmp_path, defect):
    tensors, metadata, message = DAMAGED[defect]
    save_file(tensors, tmp_path / defect, metadata=metadata)
    with pytest.raises(FormatError, match=f"{defect}: .*{message}"):
        PartialVocabulary.load(tmp_path / defect)


def test_truncated_and_missing_files_are_refused(tmp_path):
    PartialVocabulary(range(50), V).save(tmp_path / "cut")
    content = (tmp_path / "cut").read_bytes()
    for size in (0, 7, 40, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(FormatError, match="cut: damaged, or not a safetensors file"):
            PartialVocabulary.load(tmp_path / "cut")
    with pytest.raises(FormatError, match="nowhere: no such file"):
        PartialVocabulary.load(tmp_path / "nowhere")


def test_heavy_libraries_are_not_imported():
    """Create, save and load a vocabulary, and scan plain rows."""
    code = (
        "import sys; from pema_adapters.vocabulary import PartialVocabulary as P; import tempfile, os.path\n"
        "path = os.path.join(tempfile.mkdtemp(), 'x'); v = P([1], 9); v.save(path); assert P.load(path) == v\n"
        "assert P.from_dataset(iter([{'input_ids': [1]}]), vocab_size=9) == v\n"
        "heavy = {'torch', 'transformers', 'datasets', 'adapters', 'pyarrow', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=REPOSITORY)
