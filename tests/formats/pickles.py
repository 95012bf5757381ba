"""Make pickled files that torch.save would not write, from opcodes."""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch


class Storage:
    def __init__(self, key, count):
        self.key, self.count = key, count


class Claim:
    """A float32 tensor as a pickle describes it: record, numbers in its storage, offset, size, stride."""

    def __init__(self, key, count, offset, size, stride):
        self.parts = Storage(key, count), offset, size, stride, False, OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.parts


class Call:
    """What unpickling calls."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class _Pickler(pickle.Pickler):
    def persistent_id(self, item):
        return ("storage", torch.FloatStorage, item.key, "cpu", item.count) if isinstance(item, Storage) else None


def craft(path, content, records, *, byteorder="little", compression=zipfile.ZIP_STORED):
    """Write `content` (Claims by name) and `records` (bytes by key) as torch.save lays them out."""
    text = io.BytesIO()
    _Pickler(text, 2).dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", text.getvalue())
        archive.writestr("archive/byteorder", byteorder)
        for key, data in records.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return path


class Payload:
    """Leaves a file behind if it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
