"""Weights files: tensors of either format, and names as safetensors."""

import pytest
import torch
from safetensors.torch import save_file

from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.weights import read_tensors, safetensors_name

WHOLE = torch.arange(12.0).reshape(3, 4)
TENSORS = {"a": WHOLE, "half": WHOLE.bfloat16(), "none": torch.empty(0, 3), "one": torch.tensor(7)}


def described(found):
    return {name: (t.dtype, t.shape, t.nbytes, t.raw.tobytes()) for name, t in found.items()}


def test_both_formats_read_the_same(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "x.bin")
    safe, pickled = read_tensors(tmp_path / "x.safetensors"), read_tensors(tmp_path / "x.bin")
    assert described(safe) == described(pickled)
    assert list(pickled) == list(TENSORS)
    assert (safe["half"].dtype, safe["half"].shape, safe["half"].nbytes) == ("BF16", (3, 4), 24)
    for stored in (safe["a"], pickled["a"]):
        assert stored.path.read_bytes()[stored.start :][:48] == WHOLE.numpy().tobytes()


def test_all_tensors_of_a_checkpoint_are_read(tmp_path):
    torch.save(TENSORS | {"t": WHOLE.T}, tmp_path / "pytorch_model.bin")
    found = Checkpoint.open(tmp_path).tensors
    assert described(found) == described(read_tensors(tmp_path / "pytorch_model.bin"))
    assert found["t"].start is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model-00001-of-00003.bin", "model-00001-of-00003.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("model.safetensors", "model.safetensors"),
        ("pytorch_model.safetensors", "pytorch_model.safetensors"),
        ("weights.pt", "weights.safetensors"),
        ("pytorch.bin", "pytorch.safetensors"),
        ("odd", "odd.safetensors"),
    ],
)
def test_safetensors_names_of_weights_files(name, expected):
    assert safetensors_name(name) == expected
