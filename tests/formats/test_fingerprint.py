import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pema_adapters.errors import BaseMismatchError, FormatError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.fingerprint import Fingerprint, digest_rows

IDS = np.array([1, 4, 9, 10, 11])
E = "bert.embeddings.word_embeddings.weight"


def state(prefix="bert.", dtype=torch.bfloat16):
    torch.manual_seed(0)
    made = {"embeddings.word_embeddings.weight": torch.randn(10, 4), "layer.weight": torch.randn(30, 30),
            "layer.LayerNorm.gamma": torch.ones(3), "empty": torch.empty(0, 2)}  # fmt: skip
    return {prefix + name: tensor.to(dtype) for name, tensor in made.items()}


@pytest.fixture
def store(tmp_path):
    def make(tensors, name="base"):
        (tmp_path / name).mkdir(exist_ok=True)
        save_file(tensors, tmp_path / name / "model.safetensors")
        return Checkpoint.open(tmp_path / name)

    return make


@pytest.fixture
def taken(store):
    names = [name for name in state() if name != E]
    return Fingerprint.compute(store(state()), embedding=E, prefix="bert", vocab_size=12, token_ids=IDS, names=names)


def test_a_fingerprint_covers_rows_and_other_tensors(taken):
    assert (taken.embedding, taken.prefix) == ("embeddings.word_embeddings.weight", "bert")
    assert (taken.vocab_size, taken.base_vocab_size) == (12, 10)
    assert taken.tensors["layer.LayerNorm.weight"][0] == (3,)
    assert taken.tensors["empty"][0] == (0, 2)


def test_round_trip(taken):
    assert Fingerprint.from_array(taken.to_array()) == taken


@pytest.mark.parametrize("prefix", ["bert.", "", "model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_base_matches_in_other_layouts(taken, store, prefix, dtype):
    tensors = {name: t.to(dtype) for name, t in state(prefix).items()}
    taken.check(store(tensors, "other"), IDS, where="other")


def test_the_same_base_matches_in_modern_spelling(taken, store):
    tensors = {name.replace("gamma", "weight"): tensor for name, tensor in state().items()}
    taken.check(store(tensors, "other"), IDS, where="other")


def change(name, at=0):
    tensors = state()
    tensors[name].view(-1)[at] += 1
    return tensors


def test_every_difference_is_named(taken, store):
    def text(tensors):
        with pytest.raises(BaseMismatchError) as error:
            taken.check(store(tensors, "other"), IDS, where="other")
        assert str(error.value).startswith("other: ")
        return str(error.value)

    assert f"tensor '{E}': rows of the delta's tokens differ (digest" in text(change(E, 4))
    assert "tensor 'bert.layer.weight': sampled values differ" in text(change("bert.layer.weight"))
    assert "tensor 'bert.layer.weight': sampled values differ" in text(change("bert.layer.weight", 899))
    assert "no tensor 'layer.weight'" in text({n: t for n, t in state().items() if "layer.weight" not in n})
    assert "has 9 rows, expected 10" in text(state() | {E: state()[E][:9].clone()})
    assert "has shape [4], expected [3]" in text(state() | {"bert.layer.LayerNorm.gamma": torch.ones(4)})
    assert "no tensor 'embeddings.word_embeddings.weight'" in text({"x": torch.ones(1)})


def test_rows_of_other_tokens_may_differ(taken, store):
    taken.check(store(change(E, 0), "other"), IDS, where="other")


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 1500])
def test_the_digest_does_not_depend_on_the_block_size(count):
    import hashlib

    rows = np.arange(3000, dtype=np.float32).reshape(1500, 2)
    ids = np.arange(count)
    assert digest_rows(lambda some: rows[some], ids) == hashlib.sha256(rows[:count].tobytes()).hexdigest()


NONSENSE = [
    b"", b"{", b"[]", b"{}", b'"x"', b"\xff", b"[" * 100_000,
    b'{"embedding": "E"}',
]  # fmt: skip


@pytest.mark.parametrize("data", NONSENSE)
def test_damaged_fingerprints_are_refused(data):
    with pytest.raises(FormatError, match="fingerprint cannot be read"):
        Fingerprint.from_array(np.frombuffer(data, np.uint8))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)
FIELDS = ["embedding", "prefix", "vocab_size", "base_vocab_size", "rows", "tensors"]


@given(field=st.sampled_from(FIELDS), value=JSON)
def test_arbitrary_json_is_read_or_refused(field, value):
    good = {
        "embedding": "E",
        "prefix": "",
        "vocab_size": 3,
        "base_vocab_size": 3,
        "rows": "0",
        "tensors": {"x": [[1], "0"]},
    }
    data = np.frombuffer(json.dumps(good | {field: value}).encode(), np.uint8)
    try:
        found = Fingerprint.from_array(data)
    except FormatError as error:
        assert "fingerprint" in str(error)
    else:
        assert Fingerprint.from_array(found.to_array()) == found


class Counting:
    """A checkpoint that counts how often it is asked for its shapes."""

    def __init__(self, checkpoint):
        self.checkpoint, self.asked = checkpoint, 0

    def shapes(self):
        self.asked += 1
        return self.checkpoint.shapes()

    def rows(self, name, ids):
        return self.checkpoint.rows(name, ids)

    def values(self, name, positions):
        return self.checkpoint.values(name, positions)


def test_shapes_are_read_once(store):
    source = Counting(store(state() | {f"bert.layer.{i}.weight": torch.ones(2) for i in range(50)}))
    names = [name for name in source.checkpoint.tensors if name != E]
    taken = Fingerprint.compute(source, embedding=E, prefix="bert", vocab_size=12, token_ids=IDS, names=names)
    assert source.asked == 1
    taken.check(source, IDS, where="base")
    assert source.asked == 2
