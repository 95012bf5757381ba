import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pema_adapters.errors import FormatError
from pema_adapters.formats.checkpoint import Checkpoint

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


def test_a_single_file_is_read(single):
    checkpoint = Checkpoint.open(single)
    assert checkpoint.index is None
    assert checkpoint.config == {"model_type": "bert"}
    assert checkpoint.files == (single / "model.safetensors",)
    assert checkpoint.metadata(single / "model.safetensors") == {"format": "pt"}
    assert checkpoint.shapes()["bert.E"] == (10, 4)
    assert checkpoint.shapes()["scalar"] == ()


@pytest.mark.parametrize("name", ["bert.E", "half", "bhalf"])
def test_rows_and_values_are_gathered(single, name):
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


def test_deep_copies_share_the_memory_map(single):
    checkpoint = Checkpoint.open(single)
    assert copy.deepcopy(checkpoint) is checkpoint


def test_shards_are_read_in_order(sharded):
    save_file({"stray": MATRIX}, sharded / "three.safetensors")
    checkpoint = Checkpoint.open(sharded)
    assert list(checkpoint.tensors) == ["b", "a"]
    assert [path.name for path in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert np.array_equal(checkpoint.rows("b", np.array([0])), [[1, 2, 3, 4]])


def test_a_single_file_is_preferred_to_an_index(single, sharded):
    assert Checkpoint.open(single).index is None


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "/etc/passwd", "x/one.safetensors", "..", "", 3, "a\\b", "a\0b"]
)
def test_an_index_that_leaves_the_folder_is_refused(sharded, name):
    write_index(sharded, {"a": name})
    with pytest.raises(FormatError, match=r"tensor 'a': shard .* is not a file name in this folder"):
        Checkpoint.open(sharded)


def test_an_index_that_disagrees_with_the_shards_is_refused(sharded):
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(FormatError, match=r"tensor 'a' should be in one.safetensors, but that file does not hold it"):
        Checkpoint.open(sharded)


def test_a_missing_shard_is_refused(sharded):
    (sharded / "one.safetensors").unlink()
    with pytest.raises(FormatError, match=r"one.safetensors: no such file, but .*index.json lists it as a shard"):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"a": MATRIX, "b": MATRIX + 1}, sharded / "one.safetensors")
    with pytest.raises(FormatError, match=r"tensor 'a' is stored in one.safetensors as well"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "{", "[" * 100_000])
def test_an_invalid_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(
        FormatError,
        match=r"index.json: (no weight_map|not valid JSON|expected a JSON object, found list)",
    ):
        Checkpoint.open(sharded)


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"nowhere: no such folder; expected a checkpoint with model.safetensors"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        FormatError, match=r"pytorch_model.bin: not a file of tensors .* found a file that begins with b''"
    ):
        Checkpoint.open(tmp_path)


def test_a_snapshot_copied_without_its_blobs_is_recognized(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(
        FormatError, match=r"model.safetensors: is a link to ../../blobs/0123, which does not exist; copy"
    ):
        Checkpoint.open(tmp_path)


def test_a_missing_tensor_is_refused(single):
    with pytest.raises(FormatError, match=r"no tensor 'x' among its 4"):
        Checkpoint.open(single).rows("x", np.array([0]))


def pickled(folder, tensors, **config):
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
    return Checkpoint.open(folder)


def test_a_pickle_reads_like_safetensors(single, tmp_path):
    safe = Checkpoint.open(single)
    (tmp_path / "bin").mkdir()
    tensors = {"bert.E": MATRIX, "half": MATRIX.half(), "bhalf": MATRIX.bfloat16(), "scalar": torch.tensor(3)}
    checkpoint = pickled(tmp_path / "bin", tensors)
    assert checkpoint.files == (tmp_path / "bin" / "pytorch_model.bin",)
    assert checkpoint.metadata(checkpoint.files[0]) == {"format": "pt"}
    assert (checkpoint.is_pickled, checkpoint.index, checkpoint.index_file, checkpoint.shared) == (True, None, None, {})
    assert (safe.is_pickled, safe.index_file, safe.shared) == (False, None, {})
    assert checkpoint.shapes() == safe.shapes()
    assert checkpoint.config == safe.config
    ids = np.array([9, 0, 3])
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.name, tensor.dtype, tensor.nbytes) == (name, safe.tensors[name].dtype, safe.tensors[name].nbytes)
        assert checkpoint.raw(name).tobytes() == safe.raw(name).tobytes()
        if tensor.shape:
            assert np.array_equal(checkpoint.rows(name, ids), safe.rows(name, ids))
            assert np.array_equal(checkpoint.values(name, ids), safe.values(name, ids))


def test_a_deep_copied_pickle_is_the_same_object(tmp_path):
    checkpoint = pickled(tmp_path, {"a": MATRIX})
    assert copy.deepcopy(checkpoint) is checkpoint


def test_pickled_shards_are_read(tmp_path):
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save({"b": MATRIX + 1}, tmp_path / names[0])
    torch.save({"a": MATRIX}, tmp_path / names[1])
    weight_map = {"a": names[1], "b": names[0]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["b", "a"]
    assert [path.name for path in checkpoint.files] == names
    assert checkpoint.index == {"weight_map": weight_map}
    assert (checkpoint.is_pickled, checkpoint.index_file.path.name) == (True, "pytorch_model.bin.index.json")
    assert np.array_equal(checkpoint.rows("b", np.array([0])), [[1, 2, 3, 4]])
    (tmp_path / names[0]).unlink()
    with pytest.raises(
        FormatError, match=r"00001-of-00002.bin: no such file, but pytorch_model.bin.index.json lists it"
    ):
        Checkpoint.open(tmp_path)


def test_shards_whose_safetensors_names_collide_are_refused(tmp_path):
    weight_map = {"a": "x.bin", "b": "x.pt"}
    for name, file in weight_map.items():
        torch.save({name: MATRIX}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match=r"bin.index.json: two of its shards would have the same name as safetensors"):
        Checkpoint.open(tmp_path)


def test_formats_are_preferred_as_in_transformers(tmp_path):
    files = ["model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"]
    save_file({"0": MATRIX}, tmp_path / files[0])
    save_file({"1": MATRIX}, tmp_path / "shard.safetensors")
    torch.save({"2": MATRIX}, tmp_path / files[2])
    torch.save({"3": MATRIX}, tmp_path / "shard.bin")
    write_index(tmp_path, {"1": "shard.safetensors"})
    (tmp_path / files[3]).write_text(json.dumps({"weight_map": {"3": "shard.bin"}}))
    for i, file in enumerate(files):
        assert list(Checkpoint.open(tmp_path).tensors) == [str(i)]
        (tmp_path / file).unlink()


E, HEAD = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"


@pytest.mark.parametrize(
    ("names", "config", "shared"),
    [
        ([HEAD, E], {}, {HEAD: E}),
        ([HEAD, E], {"tie_word_embeddings": True}, {HEAD: E}),
        ([HEAD, E], {"tie_word_embeddings": False}, {}),
        (["lm_head.weight", "encoder.embed_tokens.weight", "shared.weight"], {},
         {"lm_head.weight": "shared.weight", "encoder.embed_tokens.weight": "shared.weight"}),
        (["lm_head.weight", "encoder.embed_tokens.weight", "shared.weight"], {"tie_word_embeddings": False},
         {"encoder.embed_tokens.weight": "shared.weight"}),
        (["a.output.head", E], {}, {"a.output.head": E}),
        (["cls.predictions.decoder.bias", "cls.predictions.bias"], {"tie_word_embeddings": False},
         {"cls.predictions.decoder.bias": "cls.predictions.bias"}),
        (["lm_head.weight", "transformer.tokens_embed.weight"], {}, {"lm_head.weight": "transformer.tokens_embed.weight"}),
        (["layer.1.weight", "layer.0.weight"], {}, {}),
    ],
)  # fmt: skip
def test_names_that_transformers_ties_again_are_dropped(tmp_path, names, config, shared):
    checkpoint = pickled(tmp_path, dict.fromkeys(names, MATRIX) | {"other": MATRIX + 1}, **config)
    assert checkpoint.shared == shared
    assert list(checkpoint.tensors) == [name for name in [*names, "other"] if name not in shared]
    for name in checkpoint.tensors:
        assert np.array_equal(checkpoint.rows(name, np.arange(10)), MATRIX + (name == "other"))


@pytest.mark.parametrize("other", [MATRIX.clone(), MATRIX[:9], MATRIX.view(4, 10), MATRIX.T, MATRIX[:0]])
def test_equal_values_and_other_views_are_kept_apart(tmp_path, other):
    checkpoint = pickled(tmp_path, {E: MATRIX, HEAD: other})
    assert checkpoint.shared == {}
    assert checkpoint.raw(HEAD).tobytes() == other.contiguous().numpy().tobytes()


def test_an_index_may_list_dropped_names(tmp_path):
    torch.save({E: MATRIX, HEAD: MATRIX}, tmp_path / "one.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {E: "one.bin", HEAD: "one.bin"}}))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.shared == {HEAD: E}
    assert list(checkpoint.index["weight_map"]) == [E, HEAD]
    assert list(checkpoint.tensors) == [E]


def test_a_tensor_in_two_spellings_is_refused(tmp_path):
    save_file({"LayerNorm.gamma": MATRIX, "LayerNorm.weight": MATRIX + 1}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"'LayerNorm.gamma' is stored as 'LayerNorm.weight' as well; expected one"):
        Checkpoint.open(tmp_path)


def test_a_huge_config_is_refused_unread(single):
    with (single / "config.json").open("r+b") as file:
        file.truncate(3 << 30)
    with pytest.raises(FormatError, match=r"config.json: 3,221,225,472 bytes, expected JSON of at most 100,000,000"):
        Checkpoint.open(single)
