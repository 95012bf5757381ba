"""Headers, names and JSON that lie: each input is refused in one readable line and leaves no trace, or is merged right.

What tools/fuzz_merge.py found is here by name, beside the most telling of its mutations.
"""

import json

import numpy as np
import pytest

from pema_adapters import merge_checkpoint
from tests.merging.conftest import IDS, D, T, V, noise, oracle, read, write
from tests.merging.corpus import ADAPTER, BASE, DEEP, INDEX, ROWS, framed, parts, refused, tensors, write_fingerprint

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def root(tmp_path, make_base, make_adapter):
    """A base in one file and an adapter with a head."""
    make_adapter(make_base(), head={"classifier.weight": T.of(noise(3, D))})
    return tmp_path


@pytest.fixture
def sharded(tmp_path, make_base, make_adapter):
    make_adapter(make_base(shards=2))
    return tmp_path


LENGTHS = {
    "no bytes": (lambda file: b"", "0 bytes are too few"),
    "seven bytes": (lambda file: file[:7], "7 bytes are too few"),
    "cut in the header": (lambda file: file[:50], "the file is truncated"),
    "cut in the data": (lambda file: file[:-1], "it is truncated"),
    "a byte more": (lambda file: file + b"\0", "1 bytes after the last tensor"),
    "a header of 0 bytes": (lambda file: bytes(8) + file[8:], "header is not valid JSON"),
    "a header of 2^63 bytes": (lambda file: (2**63).to_bytes(8, "little") + file[8:], "expected at most 100000000"),
    "a header as long as the file": (lambda file: len(file).to_bytes(8, "little") + file[8:], "the file is truncated"),
    "halves exchanged": (lambda file: file[len(file) // 2 :] + file[: len(file) // 2], "header"),
    "a zip archive": (lambda file: b"PK\x03\x04" + file, "not a safetensors file"),
}


@pytest.mark.parametrize("path", [BASE, ADAPTER])
@pytest.mark.parametrize("name", LENGTHS)
def test_files_that_are_cut_or_lie_about_their_length(root, path, name):
    change, text = LENGTHS[name]
    (root / path).write_bytes(change((root / path).read_bytes()))
    refused(root, f"{path}: .*{text}")


def entry(dtype="F32", shape=(D,), begin=0, end=4 * D):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


SQUARE = "bert.encoder.layer.0.output.dense.weight"
ENTRIES = {
    "overlap": (entry(begin=4, end=4 + 4 * D), "hole before it"),
    "negative": (entry(begin=-4, end=4 * D - 4), r"\[-4, 12\] are not \[begin, end\]"),
    "2^64": (entry(end=2**64), "are not .begin, end."),
    "fractions": (entry(end=16.0), "are not .begin, end."),
    "truths": (entry("U8", [1], False, True), "are not .begin, end."),
    "minus zero, which the safetensors library refuses": (entry(begin=-0.0), "are not .begin, end."),
    "too many dimensions": (entry(shape=[1] * 65, end=4), "is not a list of sizes"),
    "a product beyond any number": (entry(shape=[2**62] * 64), "takes .* bytes, but its data_offsets hold 16"),
    "half a byte": (entry("F4", [3], 0, 2), r"F4 \[3\] does not end with a whole byte"),
    "an unknown dtype": (entry("F128"), "unknown dtype 'F128'"),
    "a list as dtype": (entry(["F32"]), "unknown dtype"),
    "nothing": (None, "expected dtype, shape and data_offsets, found 'None'"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_headers_that_lie_about_a_tensor(root, name):
    found, text = ENTRIES[name]
    header, data = parts(root / BASE)
    made = framed({**header, SQUARE: found}, data)
    (root / BASE).write_bytes(made.replace(b"[-0.0,", b"[-0,  ") if "minus" in name else made)
    refused(root, f"{BASE}: tensor '{SQUARE}'.*{text}")


NAMES = {
    "half a surrogate pair": ("\ud800", "surrogates not allowed"),
    "twice": (SQUARE, "duplicate name"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_file_may_hold(root, name):
    new, text = NAMES[name]
    header, data = parts(root / BASE)
    made = json.dumps({**header, "NEW": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})
    (root / BASE).write_bytes(framed(made.replace('"NEW"', json.dumps(new)).encode(), data))
    refused(root, f"{BASE}: header is not valid JSON .*{text}")


TEXTS = {
    "nothing": b"",
    "a scalar": b"1",
    "a list": b"[]",
    "no UTF-8": b'{"\xff": 1}',
    "brackets": b"[" * DEEP,
    "a deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("path", ["base/config.json", "run/adapter_config.json", "run/head_config.json"])
@pytest.mark.parametrize("name", TEXTS)
def test_json_that_is_none(root, path, name):
    (root / path).write_bytes(TEXTS[name])
    refused(root, f"{path}: (not valid JSON|expected a JSON object)")


SHARDS = {
    "the folder above": "..",
    "a path": "../run/adapter.safetensors",
    "an absolute path": "/etc/passwd",
    "a path of Windows": "..\\x",
    "a zero": "\0",
    "nothing": "",
    "a number": 1,
    "null": None,
    "a line break": "a\nb",
    "half a surrogate pair": "\ud800",
    "a long name": "x" * DEEP,
    "a missing file": "model-3.safetensors",
    "another file": "config.json",
}


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_that_leads_elsewhere(sharded, name):
    index = json.loads((sharded / INDEX).read_bytes())
    index["weight_map"][SQUARE] = SHARDS[name]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "base/")


@pytest.mark.parametrize("metadata", [True, 1.5, "x", [1], [[1, 2]], None, {"total_size": "x"}, {"total_size": 10**40}])
def test_an_index_with_odd_metadata_is_merged(tmp_path, make_base, make_full, metadata):
    base = make_base(shards=2)
    delta = make_full(base)
    index = json.loads((tmp_path / INDEX).read_bytes())
    (tmp_path / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
    merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    assert read(tmp_path / "out") == oracle(base, delta)
    json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())


def test_text_that_only_json_can_spell_is_kept(tmp_path, make_base, make_full):
    base = make_base(config={"note": "\ud800", "é": "é"})
    merge_checkpoint(base.folder, make_full(base).folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (config["note"], config["é"]) == ("\ud800", "é")


PRINTS = {
    "no JSON": ("", b"x", "cannot be read"),
    "brackets": ("", b"[" * DEEP, "cannot be read"),
    "a list": ("", b"[]", "cannot be read"),
    "a size that is text": ("vocab_size", "20", "'20' where a size belongs"),
    "a size that is true": ("vocab_size", True, "'True' where a size belongs"),
    "a size of 4,001 digits": ("vocab_size", 10**4000, "where a size belongs"),
    "tokens that would fill memory": ("vocab_size", 10**12, "6 ids; expected all 999999999980 new tokens among them"),
    "more tokens than any matrix has": ("vocab_size", 2**62, "expected all .* new tokens among them"),
    "no text": ("embedding", 1, "'1' where text belongs"),
    "text with a line break": ("embedding", "a\nb", "where text belongs"),
    "half a surrogate pair": ("prefix", "\ud800", "where text belongs"),
    "tensors that are text": ("tensors", "ab", "cannot be read"),
    "a shape that is text": ("tensors", {"x": ["44", "y"]}, "'4' where a size belongs"),
    "a digest that is a number": ("tensors", {"x": [[4], 1]}, "'1' where text belongs"),
}


@pytest.mark.parametrize("name", PRINTS)
def test_a_damaged_fingerprint(root, name):
    field, value, text = PRINTS[name]
    change = (lambda data: json.dumps({**json.loads(data), field: value}).encode()) if field else (lambda data: value)
    write_fingerprint(root / ADAPTER, change)
    refused(root, f"adapter.safetensors: tensor '{ROWS}.*{text}", allow_base_mismatch=True)


def test_a_long_name_does_not_make_a_long_message(root):
    write_fingerprint(root / ADAPTER, lambda data: json.dumps({**json.loads(data), "embedding": "x" * DEEP}).encode())
    refused(root, "base: no tensor 'xxx")


def test_rows_under_two_prefixes(root):
    found = tensors(root / ADAPTER)
    weight = found.pop(ROWS + "weight")
    write(root / ADAPTER, found | {"pema.adapters.task.weight": weight})
    refused(
        root, "expected the PEMA rows of one adapter, found those of 'bert.pema.adapters.task', 'pema.adapters.task'"
    )


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "\0", "x" * 300])
def test_an_adapter_that_cannot_be_a_folder(tmp_path, make_base, make_adapter, name):
    base = make_base()
    make_adapter(base, name=name, rest={"bert.adapters.x": T.of([1.0])})
    refused(tmp_path, "(cannot be the name of a folder|names, found none; save it again)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-45, -0.0])
def test_strange_numbers_are_merged_as_they_are(tmp_path, make_base, make_adapter, value):
    base = make_base()
    rows = T.of(np.full((len(IDS), D), value))
    delta = make_adapter(base, replace={"weight": rows})
    delta.rows = rows
    merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    assert read(tmp_path / "out") == oracle(base, delta)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "C64", "F6_E2M3"])
def test_a_base_whose_numbers_cannot_be_compared(tmp_path, make_base, make_adapter, dtype):
    base = make_base()
    make_adapter(base)
    size = {"F8_E4M3": 16, "C64": 128, "F6_E2M3": 12}[dtype]
    write(tmp_path / BASE, base.tensors | {SQUARE: T(dtype, (D, D), bytes(size))})
    refused(tmp_path, f"base: tensor '{SQUARE}': .*cannot read .* of dtype {dtype}.*--allow-base-mismatch")
    merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out", allow_base_mismatch=True)
    assert tensors(tmp_path / "out" / "model.safetensors")[SQUARE].dtype == dtype


@pytest.mark.parametrize("shape", [(), (V * D,), (1, V, D), (0, D)])
def test_a_matrix_of_another_shape(tmp_path, make_base, make_adapter, shape):
    base = make_base()
    make_adapter(base)
    count = int(np.prod(shape, dtype=int))
    write(tmp_path / BASE, base.tensors | {base.embedding: T("F32", shape, bytes(4 * count))})
    for allow in (False, True):
        refused(tmp_path, "word_embeddings.weight' ", allow_base_mismatch=allow)


def test_two_tensors_for_one_of_the_base(tmp_path, make_base, make_full):
    base = make_base()
    make_full(base, replace={"pooler.dense.bias": T.of(noise(D))})
    refused(
        tmp_path, "run/model.safetensors: tensor 'pooler.dense.bias' is the second one for 'bert.pooler.dense.bias'"
    )


@pytest.mark.parametrize("count", [10**12, 10**40, 1_000_001])
def test_more_labels_than_memory(root, count):
    head = json.loads((root / "run/head_config.json").read_bytes()) | {"num_labels": count, "label2id": None}
    (root / "run/head_config.json").write_text(json.dumps(head))
    refused(root, f"head_config.json: num_labels is {str(count)[:40]}, expected at most 1000000")


def test_rows_of_float64_for_a_base_of_bfloat16(tmp_path, make_base, make_adapter):
    """A NumPy dtype equals None if it is float64: the cast must not take the one for the other."""
    base = make_base(dtype="BF16")
    delta = make_adapter(base, dtype="F64")
    merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    assert read(tmp_path / "out") == oracle(base, delta)


LAYER = "bert.encoder.layer.0.output.dense.loras.task."


@pytest.fixture
def with_lora(tmp_path, make_base, make_adapter):
    def make(b, **config):
        lora = {LAYER + "lora_A": T.of(np.ones((1, D))), LAYER + "lora_B": T.of(b)}
        make_adapter(make_base(config=config), rest=lora)
        method = {"configs": ["pema", {"architecture": "lora", "r": 1, "alpha": 4}]}
        (tmp_path / "run/adapter_config.json").write_text(json.dumps({"name": "task", "config": method}))
        return tmp_path

    return make


@pytest.mark.parametrize("model_type", [[None], ["gpt2"], {"a": 1}])
def test_a_model_type_that_is_no_text(with_lora, model_type):
    root = with_lora(np.ones((D, 1)), model_type=model_type)
    merge_checkpoint(root / "base", root / "run", root / "out", allow_base_mismatch=True)
    before, after = (tensors(root / folder / "model.safetensors")[SQUARE].values for folder in ("base", "out"))
    assert np.allclose(after, before + 4)


def test_an_adapter_that_folds_into_infinity(with_lora, recwarn):
    root = with_lora(np.full((D, 1), 3e38))
    refused(root, "base/model.safetensors: tensor .*dense.weight': with the delta folded in, a value is too large for")
    assert not list(recwarn)
