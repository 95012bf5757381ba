import json
from importlib.metadata import version

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pema_adapters.errors import FormatError
from pema_adapters.formats import safetensors_header
from pema_adapters.formats.safetensors_header import as_float32, encode_header, read_header, size_in_bytes
from pema_adapters.formats.stored_tensor import StoredTensor


def written(path, header, data=b""):
    """A file with any header: a dictionary, or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_file_written_by_hand_is_read(tmp_path):
    path = written(tmp_path / "x.safetensors", {"a": entry(), "__metadata__": {"format": "pt"}}, b"12345678")
    header = read_header(path)
    assert header.data_start == path.stat().st_size - 8
    assert header.metadata == {"format": "pt"}
    (tensor,) = header.tensors.values()
    assert tensor == StoredTensor("a", "F32", (2,), header.source, header.data_start, 8)


TWO = b"12345678" * 2
BROKEN = {
    "hole": ({"a": entry(), "b": entry(offsets=(9, 17))}, TWO + b"1", "'b' leaves a hole before it"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, TWO[:12], "'b' overlaps the tensor before it"),
    "late start": ({"a": entry(offsets=(1, 9))}, b"123456789", "'a' leaves a hole before it"),
    "beyond the end": ({"a": entry()}, b"1234567", "'a' ends at byte .*, but the file has .*; it is truncated"),
    "left over": ({"a": entry()}, b"123456789", "1 bytes after the last tensor belong to no tensor"),
    "wrong size": ({"a": entry(shape=(3,))}, b"12345678", r"F32 \[3\] takes 12 bytes, but its data_offsets hold 8"),
    "backwards": ({"a": entry(offsets=(8, 0))}, b"12345678", r"data_offsets \[8, 0\] are not \[begin, end\]"),
    "one offset": ({"a": entry(offsets=(8,))}, b"12345678", r"data_offsets \[8\] are not \[begin, end\]"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, b"", r"are not \[begin, end\]"),
    "negative size": ({"a": entry(shape=(-2,))}, b"12345678", r"shape \[-2\] is not a list of sizes"),
    "fractional size": ({"a": entry(shape=(2.0,))}, b"12345678", r"shape \[2.0\] is not a list of sizes"),
    "true as size": ({"a": entry("F64", (True,))}, b"12345678", r"shape \[True\] is not a list of sizes"),
    "huge size": ({"a": entry(shape=(2**63,))}, b"12345678", "is not a list of sizes"),
    "many dimensions": ({"a": entry(shape=(1,) * 65)}, b"12345678", "is not a list of sizes"),
    "unknown dtype": ({"a": entry("F31")}, b"12345678", "'a': unknown dtype 'F31'; expected one of BOOL, U8"),
    "dtype of another kind": ({"a": entry(["F32"])}, b"12345678", "'a': unknown dtype"),
    "missing key": ({"a": {"dtype": "F32"}}, b"", "'a': expected dtype, shape and data_offsets, found"),
    "no object": ({"a": 1}, b"", "'a': expected dtype, shape and data_offsets, found '1'"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map names to strings"),
    "metadata no object": ({"__metadata__": []}, b"", "__metadata__ must map names to strings"),
    "list": (b"[]", b"", "header is not a JSON object"),
    "space first": (b" {}", b"", "header is not a JSON object"),
    "no JSON": (b"{", b"", "header is not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', b"", "header is not valid JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "header is not valid JSON"),
    "long number": (b'{"a":' + b"1" * 10_000 + b"}", b"", "header is not valid JSON"),
    "twice": (b'{"a": 1, "a": 2}', b"", "duplicate name 'a'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_headers_are_refused(tmp_path, name):
    header, data, text = BROKEN[name]
    path = written(tmp_path / "x.safetensors", header, data)
    with pytest.raises(FormatError, match=f"x.safetensors: .*{text}") as error:
        read_header(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_damaged_lengths_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    cases = {
        b"": "0 bytes are too few",
        b"1234567": "7 bytes are too few",
        (9).to_bytes(8, "little") + b"{}": "header of 9 bytes in a file of 10; the file is truncated",
        (2**63).to_bytes(8, "little"): "expected at most 100000000; not a safetensors file",
    }
    for data, text in cases.items():
        path.write_bytes(data)
        with pytest.raises(FormatError, match=text):
            read_header(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FormatError, match="nowhere: cannot be read: no such file or directory"):
        read_header(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="expected a file, but is a directory"):
        read_header(tmp_path)


NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=3)
RECENT_DTYPES = {"C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"} if version("safetensors") < "0.8" else set()
"""Of our dtypes, those that this version of the library does not read."""
DTYPES = st.sampled_from(sorted(safetensors_header.DTYPE_BYTES.keys() - RECENT_DTYPES))


@given(
    tensors=st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=5),
    metadata=st.dictionaries(NAMES, NAMES, max_size=2),
)
def test_round_trip(tmp_path_factory, tensors, metadata):
    listed = [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    header = encode_header(listed, metadata)
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    path.write_bytes(header + bytes(sum(size_in_bytes(dtype, shape) for _, dtype, shape in listed)))
    found = read_header(path)
    assert len(header) % 8 == 0
    assert sorted((t.name, t.dtype, t.shape) for t in found.tensors.values()) == sorted(listed)
    assert found.metadata == metadata
    theirs = {name: (e["dtype"], tuple(e["shape"])) for name, e in safetensors.deserialize(path.read_bytes())}
    assert theirs == {name: (dtype, shape) for name, dtype, shape in listed}


def test_files_of_the_safetensors_library_are_read(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors").tensors
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "a": ("F32", (2, 3)), "b": ("BF16", (3,)), "c": ("I64", ()),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "I64", "I32", "U8", "BOOL"])
def test_numbers_are_decoded(dtype):
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64,
             "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
    values = torch.tensor([[0.0, 1.0, 2.5], [3.0, 100.0, 0.1]]).to(kinds[dtype])
    raw = values.view(torch.uint8).numpy()
    assert np.array_equal(as_float32(raw, dtype), values.float().numpy())


def test_numbers_of_an_unknown_dtype_are_refused():
    with pytest.raises(FormatError, match="cannot read numbers of dtype F8_E4M3"):
        as_float32(np.zeros(1, np.uint8), "F8_E4M3")


def test_tensor_sizes_in_bytes():
    assert size_in_bytes("BF16", (3, 2)) == 12
    assert size_in_bytes("F4", (3,)) == 2
    assert size_in_bytes("I64", ()) == 8


def test_a_header_of_too_many_tensors_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 2)
    tensors = {name: entry(shape=(0,), offsets=(0, 0)) for name in ("a", "b", "c")}
    path = written(tmp_path / "x.safetensors", tensors, b"")
    with pytest.raises(FormatError, match=r"x.safetensors: header of 3 tensors, expected at most 2 in one file"):
        read_header(path)
