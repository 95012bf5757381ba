"""What is no file, pickles that mean harm, and what the command says: none may hang, fill memory or run code."""

import io
import os
import pickle
import zipfile

import pytest
import torch

from pema_adapters import merge_checkpoint
from pema_adapters.cli.merge import main
from pema_adapters.errors import PemaError
from tests.merging.conftest import IDS, D, T, noise
from tests.merging.corpus import ADAPTER, BASE, DEEP, listing, refused, tensors

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def root(tmp_path, make_base, make_adapter):
    """A base in one file and an adapter with a head."""
    make_adapter(make_base(), head={"classifier.weight": T.of(noise(3, D))})
    return tmp_path


FILES = [
    BASE,
    "base/config.json",
    ADAPTER,
    "run/adapter_config.json",
    "run/model_head.safetensors",
    "run/head_config.json",
]


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/null", "/nowhere", "itself", "folder", "/proc/self/mem"])
def test_what_is_no_file(root, path, kind):
    """None may hang or fill memory. What is not there may be missed (a head, a configuration), or not."""
    (root / path).unlink()
    if kind == "pipe":
        os.mkfifo(root / path)
    elif kind == "folder":
        (root / path).mkdir()
    else:
        (root / path).symlink_to(root / path if kind == "itself" else kind)
    before = listing(root)
    try:
        merge_checkpoint(root / "base", root / "run", root / "out")
    except PemaError as error:
        assert str(root) in str(error)
        assert listing(root) == before
    else:
        assert path in ("base/config.json", "run/model_head.safetensors")


def test_modules_that_are_named_twice(root):
    (root / "base/1_Pooling").mkdir()
    (root / "base/1_Pooling/config.json").write_text("{}")
    (root / "base/modules.json").write_text('[{"path": "1_Pooling"}, {"path": "1_Pooling"}]')
    merge_checkpoint(root / "base", root / "run", root / "out")
    assert (root / "out/1_Pooling/config.json").exists()


@pytest.mark.parametrize("content", [b"[" * DEEP, b"[1]", b'[{"path": 1}]', b'[{"path": "../run"}]', b"{", None])
def test_odd_modules_are_left_behind(root, content):
    if content is None:
        os.mkfifo(root / "base/modules.json")
    else:
        (root / "base/modules.json").write_bytes(content)
    merge_checkpoint(root / "base", root / "run", root / "out")
    assert not (root / "out" / "run").exists()


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


TOWER = b")" + b"q\x01h\x01\x86" * 40
LISTS = b"]" + b"q\x01]q\x02h\x01ah\x01ah\x02" * 40
PICKLES = {
    "a command": pickle.dumps({"x": Call(os.system, "touch canary")}, 2),
    "a command, protocol 0": pickle.dumps(Call(os.system, "touch canary"), 0),
    "eval": b"\x80\x02cbuiltins\neval\n(X\x15\x00\x00\x00open('canary', 'w')tR.",
    "something that takes 2^40 steps to hash": b"\x80\x02}" + TOWER + b"K\x01s.",
    "something that takes 2^40 letters to print": b"\x80\x02" + LISTS + b")R.",
    "a name without end": b"\x80\x02c" + b"x" * DEEP,
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "100,000 lists in each other": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "a gigabyte": b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00@\x85R.",
    "a string that is not there": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "half a surrogate pair": pickle.dumps({"\ud800": None}, 2),
    "nothing": b"",
    "a number": b"\x80\x02K\x01.",
    "another protocol": b"\x80\xff}.",
}


def zipped(table):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", table), ("byteorder", b"little"), ("data/0", bytes(16)), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


@pytest.mark.parametrize("is_zipped", [True, False])
@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles(root, monkeypatch, recwarn, name, is_zipped):
    monkeypatch.chdir(root)
    (root / ADAPTER).unlink()
    (root / "run/pytorch_adapter.bin").write_bytes(zipped(PICKLES[name]) if is_zipped else PICKLES[name])
    refused(root, "pytorch_adapter.bin: ")
    assert not (root / "canary").exists()
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_a_tensor_whose_size_overflows(root):
    """2^31 by 2^31 floats of one stored are 2^64 bytes, which 64 bits call 0."""
    size = b"\x8a\x05\x00\x00\x00\x80\x00" * 2 + b"\x86"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    huge = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + b"K\x00K\x00\x86\x89"
    table = b"\x80\x02}X\x01\x00\x00\x00x" + huge + b"ccollections\nOrderedDict\n)RtRs."
    (root / ADAPTER).unlink()
    (root / "run/pytorch_adapter.bin").write_bytes(zipped(table))
    refused(root, "tensor 'x': .* takes 18446744073709551616 bytes, but only 16 are stored")


def test_an_honest_pickle_with_shared_tensors(root):
    """What is used twice there is flat: names, sizes, tensors."""
    found = tensors(root / ADAPTER)
    (root / ADAPTER).unlink()
    made = {name: torch.nn.Parameter(t.values, False) if t.dtype == "F32" else t.values for name, t in found.items()}
    torch.save(made, root / "run/pytorch_adapter.bin")
    assert merge_checkpoint(root / "base", root / "run", root / "out").rows_merged == len(IDS)


@pytest.mark.parametrize("architectures", [5, [5], ["\ud800"], ["a b"], [], {}, None])
def test_the_command_tells_how_to_load_what_has_an_odd_config(tmp_path, make_base, make_adapter, capsys, architectures):
    base = make_base(config={"architectures": architectures})
    make_adapter(base, rest={"bert.encoder.odd.task.x": T.of([1.0])})
    code = main(["--base", str(base.folder), "--delta", str(tmp_path / "run")])
    assert code == 0, capsys.readouterr().err
    assert "AutoModel" in capsys.readouterr().out


def test_the_command_without_a_config(tmp_path, make_base, make_adapter, capsys):
    base = make_base()
    make_adapter(base, rest={"bert.encoder.odd.task.x": T.of([1.0])})
    (base.folder / "config.json").unlink()
    assert main(["--base", str(base.folder), "--delta", str(tmp_path / "run")]) == 0
    assert "AutoModel" in capsys.readouterr().out
