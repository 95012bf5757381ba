"""Pickles are memory-mapped, after their claims have been checked."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from pema_adapters.errors import FormatError
from pema_adapters.formats.torch_pickle import read_pickle
from tests.formats.pickles import Call, Claim, Payload, craft

RECORDS = {"0": np.arange(8, dtype="<f4").tobytes(), "1": np.arange(100, 104, dtype="<f4").tobytes()}
HONEST = Claim("1", 4, 0, (4,), (1,))
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.bin"


def raw(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def check(path, tensors):
    """What is read are the bytes of `tensors`, and they lie in the file where it is said."""
    torch.save(tensors, path)
    found, data = read_pickle(path), path.read_bytes()
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        stored = found[name]
        assert (stored.name, stored.shape, stored.path, stored.raw.dtype) == (name, tuple(tensor.shape), path, np.uint8)
        assert (stored.raw.tobytes(), stored.nbytes) == (raw(tensor), tensor.nbytes)
        assert (stored.start is None) == (not tensor.is_contiguous())
        if stored.start is not None:
            assert data[stored.start : stored.start + stored.nbytes] == raw(tensor)
        with pytest.raises(ValueError, match=r"read-only"):
            stored.raw[:1] = 0
    return found


def test_every_dtype_is_read(path):
    values = torch.tensor([[0, 1, 2], [3, 4, 100]])
    found = check(path, {name: values.to(dtype) for name, dtype in DTYPES.items()})
    assert {name: stored.dtype for name, stored in found.items()} == {name: name for name in DTYPES}


def test_views_and_parameters_are_read(path):
    whole = torch.arange(24.0).reshape(6, 4)
    check(path, {
        "whole": whole, "rows": whole[2:4], "row": whole[3], "last": whole[-1:], "flat": whole.view(-1),
        "transposed": whole.T, "column": whole[:, 1], "strided": whole[::2], "permuted": whole.view(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(7), "empty": torch.empty(0, 3), "also_empty": whole[:0], "one": torch.arange(5).expand(1, -1),
        "parameter": torch.nn.Parameter(whole.clone()), "half": torch.nn.Parameter(whole.bfloat16(), requires_grad=False),
    })  # fmt: skip


def test_views_of_a_larger_storage_are_read(path):
    check(path, {"end": torch.arange(100_000.0)[99_990:]})


def test_an_empty_dictionary_is_read(path):
    assert check(path, {}) == {}
    assert check(path, {"a": torch.empty(0)})["a"].start == 0


def test_tied_tensors_are_the_same_bytes(path):
    whole = torch.arange(6.0).reshape(2, 3)
    found = check(path, {"a": whole, "b": whole, "t": whole.T, "u": whole.T})
    assert found["a"].start == found["b"].start
    assert found["t"].raw is found["u"].raw


def test_unused_records_are_ignored(path):
    found = read_pickle(craft(path, {"b": HONEST}, RECORDS))
    assert np.array_equal(found["b"].raw.view("<f4"), [100, 101, 102, 103])


@pytest.mark.parametrize(
    ("claim", "what"),
    [
        (Claim("0", 8, 0, (2**40,), (0,)), r"tensor 'a': \[1099511627776\] takes 4398046511104 bytes, but only 32 are"),
        (Claim("0", 8, 0, (3, 4), (0, 1)), r"tensor 'a': \[3, 4\] takes 48 bytes, but only 32 are stored: an expanded"),
        (Claim("0", 16, 0, (16,), (1,)), "its tensors are not the records of its zip archive"),
        (Claim("0", 4, 0, (4,), (1,)), "its tensors are not the records of its zip archive"),
        (Claim("0", 2**40, 0, (2**40,), (1,)), "not a file of tensors that torch can read safely"),
        (Claim("0", 8, 0, (2**30,), (1,)), "not a file of tensors that torch can read safely"),
        (Claim("0", 8, 0, (2, 4), (1000, 1)), "not a file of tensors that torch can read safely"),
        (Claim("0", 8, 100, (2, 4), (4, 1)), "not a file of tensors that torch can read safely"),
        (Claim("0", 8, -4, (2, 4), (4, 1)), "not a file of tensors that torch can read safely"),
        (Claim("0", 8, 0, (2**40, 2**40), (0, 0)), "not a file of tensors that torch can read safely"),
        (Claim("nowhere", 8, 0, (8,), (1,)), "not a file of tensors that torch can read safely .*data/nowhere"),
        (Call(bytearray, 10**15), r"'archive/data.pkl' \(\d+ bytes\) asks for more memory than tensors need"),
        (Call(torch.Tensor, 10**8), "its tensors are not the records of its zip archive"),
    ],
)  # fmt: skip
def test_claims_beyond_the_file_are_refused(path, claim, what):
    with pytest.raises(FormatError, match=rf"x\.bin: .*{what}"):
        read_pickle(craft(path, {"a": claim, "b": HONEST}, RECORDS))


def test_many_transposes_of_one_matrix_are_refused(path):
    torch.save({"a": torch.ones(100, 100).T, **{f"t{i}": torch.ones(1) for i in range(3)}}, path)
    assert read_pickle(path)["a"].nbytes == 40_000
    whole = torch.ones(100, 100)
    torch.save({f"t{i}": whole[: 50 + i].T for i in range(40)}, path)
    with pytest.raises(
        FormatError, match=r"x\.bin: 40 transposed or sliced tensors take \d+ bytes of memory, more than"
    ):
        read_pickle(path)


def test_compressed_records_are_refused(path):
    craft(path, {"b": HONEST}, RECORDS, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match=r"x\.bin: record 'archive/data.pkl' is compressed; expected it stored; if"):
        read_pickle(path)


def test_big_endian_files_are_refused(path):
    with pytest.raises(FormatError, match=r"x\.bin: saved on a big-endian machine"):
        read_pickle(craft(path, {"b": HONEST}, RECORDS, byteorder="big"))


@pytest.mark.parametrize("where", ["whole", "a tensor", "old format", "bare"])
def test_nothing_is_executed(path, tmp_path, where):
    payload = Payload(tmp_path / "executed")
    if where == "bare":
        path.write_bytes(pickle.dumps(payload))
    else:
        content = payload if where == "whole" else {"a": payload}
        torch.save(content, path, _use_new_zipfile_serialization=where != "old format")
    with pytest.raises(FormatError, match=r"x\.bin: not a file of tensors that .*if you trust its source") as error:
        read_pickle(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_the_format_before_torch_1_6_is_refused(path):
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        FormatError, match=r"expected a zip archive, as torch.save writes since PyTorch 1.6, found .*save_pretrained"
    ):
        read_pickle(path)


@pytest.mark.parametrize("keep", [0, 3, 4, 100, 2000, -1, -30, -200])
def test_truncated_files_are_refused(path, keep):
    torch.save({"a": torch.ones(1000), "b": torch.ones(3)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"x\.bin: not a file of tensors") as error:
        read_pickle(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [{"a": 1}, [torch.ones(1)], torch.ones(1), {"model": {"a": torch.ones(1)}}, {1: torch.ones(1)}]
)
def test_anything_but_a_dictionary_of_tensors_is_refused(path, content):
    torch.save(content, path)
    with pytest.raises(FormatError, match=r"x\.bin: expected a dictionary of tensors, found"):
        read_pickle(path)


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.ones(2, device="meta")]
)
def test_unsupported_tensors_are_refused(path, tensor):
    torch.save({"a": tensor}, path)
    with pytest.raises(
        FormatError, match=r"x\.bin: (tensor 'a': torch\..* is not supported in a checkpoint|not a file)"
    ):
        read_pickle(path)


def test_a_missing_file_is_refused(path, tmp_path):
    with pytest.raises(FormatError, match=r"x\.bin: cannot be read: no such file or directory"):
        read_pickle(path)
    with pytest.raises(FormatError, match=r": expected a file, but is a directory"):
        read_pickle(tmp_path)


def test_a_pipe_is_refused(path):
    os.mkfifo(path)
    with pytest.raises(FormatError, match=r"x\.bin: expected a file, but it is a device or a pipe"):
        read_pickle(path)
