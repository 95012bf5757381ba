import pickle

import pytest
import torch

from pema_adapters.errors import FormatError
from pema_adapters.formats.tensors import read_tensors


def test_pickles_hold_the_same_bytes(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": whole, "t": whole.T, "half": whole.bfloat16(), "none": torch.empty(0, 3), "one": torch.tensor(7)}
    torch.save(tensors, tmp_path / "x.bin")
    found = read_tensors(tmp_path / "x.bin")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "a": ("F32", (3, 4)), "t": ("F32", (4, 3)), "half": ("BF16", (3, 4)), "none": ("F32", (0, 3)), "one": ("I64", ()),
    }  # fmt: skip
    for name, tensor in tensors.items():
        expected = tensor.contiguous().reshape(-1)
        assert found[name].raw.tobytes() == (expected.view(torch.uint8).numpy().tobytes() if len(expected) else b"")


class Payload:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [Payload(), {"a": Payload()}])
def test_nothing_is_executed(tmp_path, capsys, content):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(FormatError, match=r"x.bin: not a file of tensors that torch can read safely"):
        read_tensors(tmp_path / "x.bin")
    assert capsys.readouterr().out == ""


def test_a_bare_pickle(tmp_path, capsys):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(FormatError, match=r"not a file of tensors"):
        read_tensors(tmp_path / "x.bin")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [{"a": 1}, [torch.ones(1)], torch.ones(1)])
def test_not_a_dictionary_of_tensors(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(FormatError, match=r"x.bin: expected a dictionary of tensors"):
        read_tensors(tmp_path / "x.bin")


def test_a_dtype_without_a_place(tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.bin")
    with pytest.raises(FormatError, match=r"tensor 'a': torch.complex64 .* has no place in a checkpoint"):
        read_tensors(tmp_path / "x.bin")


def test_a_file_cut_short(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:2000])
    with pytest.raises(FormatError, match=r"x.bin: not a file of tensors"):
        read_tensors(tmp_path / "x.bin")
