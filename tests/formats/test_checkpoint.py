import copy
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pema_adapters.errors import FormatError
from pema_adapters.formats.checkpoint import Checkpoint, canonical, match

INDEX = "model.safetensors.index.json"
MATRIX = torch.arange(40.0).reshape(10, 4)


@pytest.fixture
def single(tmp_path):
    tensors = {"bert.E": MATRIX, "half": MATRIX.half(), "bhalf": MATRIX.bfloat16(), "scalar": torch.tensor(3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": MATRIX}, tmp_path / "two.safetensors")
    save_file({"b": MATRIX + 1}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 320}, "weight_map": weight_map}))


def test_one_file(single):
    checkpoint = Checkpoint.open(single)
    assert checkpoint.index is None
    assert checkpoint.config == {"model_type": "bert"}
    assert checkpoint.files == (single / "model.safetensors",)
    assert checkpoint.metadata == {single / "model.safetensors": {"format": "pt"}}
    assert checkpoint.shapes()["bert.E"] == (10, 4)
    assert checkpoint.shapes()["scalar"] == ()


@pytest.mark.parametrize("name", ["bert.E", "half", "bhalf"])
def test_gathers(single, name):
    checkpoint = Checkpoint.open(single)
    ids = np.array([9, 0, 3])
    assert np.array_equal(checkpoint.rows(name, ids), MATRIX[[9, 0, 3]].numpy())
    assert np.array_equal(checkpoint.values(name, np.array([39, 0, 5])), [39, 0, 5])
    size = checkpoint.tensors[name].nbytes // 40
    assert checkpoint.raw_rows(name, ids).shape == (3, 4 * size)
    assert checkpoint.rows(name, ids[:0]).shape == (0, 4)


def test_bytes_are_read_only(single):
    with pytest.raises(ValueError, match=r"read-only"):
        Checkpoint.open(single).raw("bert.E")[0] = 1


def test_copies_share_the_map_and_pickles_open_it_again(single):
    checkpoint = Checkpoint.open(single)
    assert copy.deepcopy(checkpoint) is checkpoint
    checkpoint.raw("bert.E")
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again == checkpoint
    assert len(pickle.dumps(checkpoint)) < 500


def test_shards(sharded):
    save_file({"stray": MATRIX}, sharded / "three.safetensors")
    checkpoint = Checkpoint.open(sharded)
    assert list(checkpoint.tensors) == ["b", "a"]
    assert [path.name for path in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert np.array_equal(checkpoint.rows("b", np.array([0])), [[1, 2, 3, 4]])


def test_one_file_counts_before_an_index(single, sharded):
    assert Checkpoint.open(single).index is None


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "x/one.safetensors", "..", "", 3, "a\\b", "a\0b"]
)
def test_an_index_that_leaves_the_folder(sharded, name):
    write_index(sharded, {"a": name})
    with pytest.raises(FormatError, match=r"tensor 'a': shard .* is not a file name in this folder"):
        Checkpoint.open(sharded)


def test_an_index_that_disagrees_with_the_shards(sharded):
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(FormatError, match=r"tensor 'a' should be in one.safetensors, but that file does not hold it"):
        Checkpoint.open(sharded)


def test_a_shard_that_is_missing(sharded):
    (sharded / "one.safetensors").unlink()
    with pytest.raises(
        FormatError, match=r"one.safetensors: a shard that .*index.json names, but there is no such file"
    ):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards(sharded):
    save_file({"a": MATRIX, "b": MATRIX + 1}, sharded / "one.safetensors")
    with pytest.raises(FormatError, match=r"tensor 'a' is stored in one.safetensors as well"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", "[" * 100_000])
def test_an_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(
        FormatError, match=r"index.json: (no weight_map|not valid JSON|expected a JSON object, found list)"
    ):
        Checkpoint.open(sharded)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FormatError, match=r"nowhere: no such folder; expected a checkpoint with model.safetensors"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"pytorch_model.bin: a pickled checkpoint, which cannot be read yet"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_is_not_there(single):
    with pytest.raises(FormatError, match=r"no tensor 'x' among its 4"):
        Checkpoint.open(single).rows("x", np.array([0]))


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("bert.embeddings.LayerNorm.gamma", "bert", "embeddings.LayerNorm.weight"),
        ("embeddings.LayerNorm.beta", "bert", "embeddings.LayerNorm.bias"),
        ("bertha.x", "bert", "bertha.x"),
        ("bert.x", "", "bert.x"),
        ("bert.bert.x", "bert", "bert.x"),
        ("gamma", "bert", "gamma"),
    ],
)
def test_canonical_names(name, prefix, expected):
    assert canonical(name, prefix) == expected


def test_match_prefers_the_prefixed_name():
    assert match(["x", "bert.x", "y"], "bert") == {"x": "bert.x", "y": "y"}
    assert match(["bert.x", "x"], "bert") == {"x": "bert.x"}
