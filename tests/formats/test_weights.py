"""One way to read the tensors of a file, whatever its format."""

import torch
from safetensors.torch import save_file

from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.weights import read_tensors

WHOLE = torch.arange(12.0).reshape(3, 4)
TENSORS = {"a": WHOLE, "half": WHOLE.bfloat16(), "none": torch.empty(0, 3), "one": torch.tensor(7)}


def described(found):
    return {name: (t.dtype, t.shape, t.nbytes, t.raw.tobytes()) for name, t in found.items()}


def test_both_formats_hold_the_same(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "x.bin")
    safe, pickled = read_tensors(tmp_path / "x.safetensors"), read_tensors(tmp_path / "x.bin")
    assert described(safe) == described(pickled)
    assert list(pickled) == list(TENSORS)
    assert (safe["half"].dtype, safe["half"].shape, safe["half"].nbytes) == ("BF16", (3, 4), 24)
    for stored in (safe["a"], pickled["a"]):
        assert stored.path.read_bytes()[stored.start :][:48] == WHOLE.numpy().tobytes()


def test_all_tensors_of_a_checkpoint(tmp_path):
    torch.save(TENSORS | {"t": WHOLE.T}, tmp_path / "pytorch_model.bin")
    found = Checkpoint.open(tmp_path).tensors
    assert described(found) == described(read_tensors(tmp_path / "pytorch_model.bin"))
    assert found["t"].start is None
