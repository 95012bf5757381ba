"""Small pickles that expand without bound are detected; those that torch writes pass."""

import io
import pickle
import zipfile

import pytest
import torch

from pema_adapters.formats.pickle_guard import find_expansion_attack


def saved(path, content):
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def states():
    shared = torch.ones(3, 3)
    model = torch.nn.TransformerEncoderLayer(8, 2, 16)
    yield "a model", model.state_dict()
    yield "parameters", dict(model.named_parameters())
    yield "one tensor, many names", {f"name.{i}": shared for i in range(100)}
    yield "views", {f"name.{i}": shared[i] for i in range(3)}
    yield "sizes that are one object", {"a": torch.nn.Parameter(shared), "b": shared.T, "c": shared.to(torch.bfloat16)}
    yield "nothing", {}


@pytest.mark.parametrize(("name", "content"), states())
def test_pickles_of_torch_pass(tmp_path, name, content):
    assert find_expansion_attack(saved(tmp_path / "x.bin", content)) is None


def test_a_reused_size_passes():
    assert find_expansion_attack(pickle.dumps([(3, 4), (size := (1, 2)), size, size], 2)) is None


def test_growth_by_references_is_detected():
    word = "x" * 10_000
    assert find_expansion_attack(pickle.dumps([word, word], 2)) is None
    assert "refers to the same value again and again" in find_expansion_attack(pickle.dumps([word] * 100, 2))


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (b")" + b"q\x01h\x01\x86" * 3, "refers to the same value"),
        (b"]" + b"q\x01]q\x02h\x01ah\x01ah\x02" * 3, "refers to the same value"),
        (b"]q\x00(h\x00h\x00e", "refers to the same value"),
        (b"ccollections\nOrderedDict\n)Rq\x00h\x00", "refers to the same value"),
        (b"]2", "repeats"),
        (b"]" + b"\x85" * 60, "nests deeper than 50 levels"),
        (b"]" * 60 + b"a" * 59, "nests deeper than 50 levels"),
        (b"}q\x00X\x01\x00\x00\x00ah\x00s", "refers to the same value"),
    ],
)
def test_expanding_pickles_are_detected(code, what):
    assert what in find_expansion_attack(b"\x80\x02" + code + b".")


@pytest.mark.parametrize("code", [b"", b"\x80\x02", b"\xfe.", b"X\xff\xff\xff\x7fabc.", b"cx\n"])
def test_anything_but_a_pickle_is_refused(code):
    with pytest.raises(ValueError, match=r".+"):
        find_expansion_attack(code)


@pytest.mark.parametrize("code", [b".", b"000.", b"(((.", b"s.", b"R.", b"t.", b"h\x05."])
def test_a_stack_that_is_too_short_is_left_to_the_unpickler(code):
    assert find_expansion_attack(code) is None


def test_many_items_pass():
    buffer = io.BytesIO()
    pickle.Pickler(buffer, 2).dump([[i] for i in range(5000)])
    assert find_expansion_attack(buffer.getvalue()) is None
