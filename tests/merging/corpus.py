"""What the tests of hostile inputs share: files taken apart, and a refusal that leaves no trace."""

import json

import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import PemaError
from tests.merging.conftest import T, write

BASE, INDEX, ADAPTER = "base/model.safetensors", "base/model.safetensors.index.json", "run/adapter.safetensors"
ROWS = "bert.pema.adapters.task."
DEEP = 100_000


def listing(root):
    """Every path, and the bytes of files; of links, pipes and devices, that they are there."""
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in root.rglob("*")}


def refused(root, text, **options):
    before = listing(root)
    with pytest.raises(PemaError, match=text) as error:
        merge_checkpoint(root / "base", root / "run", root / "out", **options)
    assert listing(root) == before
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 2000
    return str(error.value)


def parts(path):
    """The header of a file as a dictionary, and the data."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def framed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensors(path):
    """All tensors of a file, by name."""
    header, data = parts(path)
    header.pop("__metadata__", None)
    return {n: T(e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])]) for n, e in header.items()}


def write_fingerprint(path, change):
    """Put `change(the fingerprint's bytes)` in its place in an adapter's file."""
    found = tensors(path)
    data = change(found[ROWS + "fingerprint"].data)
    write(path, found | {ROWS + "fingerprint": T("U8", (len(data),), data)})
