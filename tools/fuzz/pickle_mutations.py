"""Mutations of pickled files: hostile pickles, false tensor metadata, inconsistent zip archives.

A file called `CANARY` in the current folder must not appear: it would mean that code from a pickle was run.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz.mutations import add, is_pickle, label

CANARY = "canary"
STORAGE = b"X\x07\x00\x00\x00storage"


class Payload:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def records(file: bytes) -> dict[str, bytes]:
    """Return the records of an archive of torch.save."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def archive(found: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        for name, data in found.items():
            made.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def record_mutation(family: str, name: str, change: Callable[[dict[str, bytes], Random], Any]) -> None:
    """Add a mutation: `change` alters the records; the archive is then rewritten."""

    def make(file: bytes, random: Random) -> bytes:
        found = records(file)
        return archive(change(found, random) or found)

    add(family, name, make, is_pickle)


def table_mutation(family: str, name: str, change: Callable[[bytes], bytes]) -> None:
    """Add a mutation: `change` returns another data.pkl."""

    def altered(found: dict[str, bytes], random: Random) -> None:
        table = next(name for name in found if name.endswith("data.pkl"))
        found[table] = change(found[table])

    record_mutation(family, name, altered)


def call(module: str, name: str, *arguments: Any) -> bytes:
    """Return a pickle that calls a global."""
    items = b"".join(pickle.dumps(argument, 2)[2:-1] for argument in arguments)
    return f"\x80\x02c{module}\n{name}\n(".encode() + items + b"tR."


def _shell(command: str) -> dict[str, bytes]:
    """Return pickles that run a shell command, in every known way."""
    import os
    import subprocess

    return {
        "os.system": pickle.dumps({"x": Payload(os.system, command)}, 2),
        "os.system, protocol 0": pickle.dumps(Payload(os.system, command), 0),
        "os.system, protocol 4": pickle.dumps(Payload(os.system, command), 4),
        "subprocess": pickle.dumps([Payload(subprocess.call, ["sh", "-c", command])], 2),
        "eval": call("builtins", "eval", f"__import__('os').system({command!r})"),
        "exec": call("__builtin__", "exec", f"import os; os.system({command!r})"),
        "getattr": call("builtins", "getattr", "os", "system"),
        "INST": b"(S" + repr(command).encode() + b"\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS" + repr(command).encode() + b"\no.",
        "torch's own": call("torch.serialization", "load", CANARY),
        "torch.hub": call("torch.hub", "load", "/tmp", "x"),
        "numpy": call("numpy.core.multiarray", "_reconstruct", "x", (0,), "b"),
        "runpy": call("runpy", "_run_code", f"open({CANARY!r}, 'w')", {}),
        "a dotted name": call("torch", "os.system", command),
    }


def _tower(depth: int, push: bytes = b"", double: bytes = b"q\x01h\x01\x86") -> bytes:
    """Return a tuple of twice the same tuple, nested `depth` times: a small pickle of 2^depth objects."""
    return b"\x80\x02" + (push or b")") + double * depth


def _lists(depth: int) -> bytes:
    return b"\x80\x02]" + b"q\x01]q\x02h\x01ah\x01ah\x02" * depth


HOSTILE: dict[str, bytes] = {
    "empty": b"", "a stop": b".", "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary that holds itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "nothing": b"\x80\x02N.",
    "a number": b"\x80\x02K\x01.", "an empty dictionary": b"\x80\x02}.",
    "a memo far away": b"\x80\x02}r\xff\xff\xff\xff.",
    "a string that is not there": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "bytes that are not there": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "a frame that is not there": b"\x80\x04\x95" + b"\xff" * 8 + b".", "pops of nothing": b"\x80\x020000.",
    "marks": b"\x80\x02" + b"(" * 200_000 + b".", "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a tower": _tower(40) + b".", "a tower as a key": b"\x80\x02}" + _tower(40)[2:] + b"K\x01s.",
    "a tower in a set": b"\x80\x02c__builtin__\nset\n" + b"]" + _tower(40)[2:] + b"a\x85R.",
    "a tower that is called": _lists(40) + b")R.",
    "a tower as a value": b"\x80\x02}X\x01\x00\x00\x00a" + _lists(40)[2:] + b"s.",
    "a tower as an argument": call("torch", "Size", 1)[:-4] + _lists(40)[2:] + b"tR.",
    "a tower as a global's argument": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + _lists(40)[2:] + b"tR.",
    "a tower as a storage": b"\x80\x02(" + STORAGE + _lists(40)[2:] + b"tQ.",
    "a tower as an id": b"\x80\x02" + _lists(40)[2:] + b"Q.",
    "bytearray": call("builtins", "bytearray", 10**9), "bytearray, old name": call("__builtin__", "bytearray",
    10**9),
    "a tensor of 4 GB": b"\x80\x02ctorch\nFloatTensor\n(" + b"J\x00\x00\x00@" + b"t\x81.",
    "a Counter": call("collections", "Counter", "abc"), "an OrderedDict": pickle.dumps(OrderedDict(a=1), 2),
    "encode": call("_codecs", "encode", "x" * 10, "rot13"), "encode, zip": call("_codecs", "encode", b"x", "zip"),
    "a number as a name": b"\x80\x02}K\x01K\x01s.", "a tensor as a name": b"\x80\x02}NNs.",
    "strings": pickle.dumps({"a": "b"}, 2),
    "tensors in a dictionary": pickle.dumps({"state_dict": {"a": 1}}, 2), "floats": pickle.dumps([1.0] * 1000, 2),
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f.", "an int of 200 kB": b"\x80\x02I" + b"9" * 200_000 + b"\n.",
    "an unknown instruction": b"\x80\x02\xfe.", "protocol 255": b"\x80\xff}.", "text": b"hello world",
    "a module that is not there": b"\x80\x02cno_such\nthing\n.", "a name without end": b"\x80\x02c" + b"x" * 100_000,
    "a name with lines": call("torch\x1b[31m", "x", 1),
}  # fmt: skip


def _size(*sizes: int) -> bytes:
    """Pickle a tuple of integers."""
    return b"(" + b"".join(pickle.dumps(size, 2)[2:-1] for size in sizes) + b"t"


HONEST = {"key": "0", "numel": 4, "offset": 0, "size": (4,), "stride": (1,), "kind": "FloatStorage", "where": "cpu",
          "rebuild": "_rebuild_tensor_v2"}  # fmt: skip


def tensor(**lies: Any) -> bytes:
    """Return the instructions that make a tensor, as torch.save writes them, except for false fields."""
    said = HONEST | lies
    key, where, numel, offset = (pickle.dumps(said[name], 2)[2:-1] for name in ("key", "where", "numel", "offset"))
    storage = b"(" + STORAGE + f"ctorch\n{said['kind']}\n".encode() + key + where + numel + b"tQ"
    rest = offset + _size(*said["size"]) + _size(*said["stride"]) + b"\x89ccollections\nOrderedDict\n)R"
    return f"ctorch._utils\n{said['rebuild']}\n(".encode() + storage + rest + b"tR"


def dictionary(*made: bytes) -> bytes:
    """Return a pickle of a dictionary of tensors named x0, x1, ..."""
    items = b"".join(b"X\x02\x00\x00\x00" + f"x{i}".encode() + item for i, item in enumerate(made))
    return b"\x80\x02}(" + items + b"u."


LIES: dict[str, bytes] = {
    "more elements than stored": dictionary(tensor(numel=10**6)), "2^62 elements": dictionary(tensor(numel=2**62)),
    "-1 elements": dictionary(tensor(numel=-1)), "an offset beyond": dictionary(tensor(offset=10**6)),
    "a negative offset": dictionary(tensor(offset=-1)), "a larger size": dictionary(tensor(size=(10**6,))),
    "a huge size": dictionary(tensor(size=(2**40,), stride=(0,))), "a huge matrix": dictionary(tensor(size=(2**31,
    2**31), stride=(0, 0))),
    "a negative size": dictionary(tensor(size=(-4,))), "a negative stride": dictionary(tensor(stride=(-1,))),
    "a stride beyond": dictionary(tensor(stride=(10**6,))), "views": dictionary(*[tensor(size=(10**5,), stride=(0,
    ))] * 50),
    "an unknown record": dictionary(tensor(key="99")), "a record elsewhere": dictionary(tensor(key="../../etc/passwd")),
    "another device": dictionary(tensor(where="cuda:0")), "a meta tensor": dictionary(tensor(where="meta")),
    "a strange device": dictionary(tensor(where="x" * 1000)), "another kind": dictionary(tensor(kind="DoubleStorage")),
    "no kind": dictionary(tensor(kind="NoStorage")), "bytes": dictionary(tensor(kind="ByteStorage", numel=16, size=(16,
    ))),
    "complex": dictionary(tensor(kind="ComplexFloatStorage", numel=2, size=(2,))),
    "quantized": dictionary(tensor(kind="QInt8Storage")), "untyped": dictionary(tensor(kind="UntypedStorage",
    numel=16)),
    "an older function": dictionary(tensor(rebuild="_rebuild_tensor")),
    "sparse": dictionary(tensor(rebuild="_rebuild_sparse_tensor")),
    "no dimensions": dictionary(tensor(size=(), stride=())), "65 dimensions": dictionary(tensor(size=(1,) * 65,
    stride=(1,) * 65)),
    "10,000 dimensions": dictionary(tensor(size=(1,) * 10_000, stride=(1,) * 10_000)),
    "no elements": dictionary(tensor(size=(0,))),
    "two kinds of one record": dictionary(tensor(), tensor(kind="HalfStorage", numel=8)), "transposed": dictionary(
        tensor(size=(2, 2), stride=(1, 2))),
}  # fmt: skip


Number = tuple[bytes, int, str]
"""Of a zip archive: the signature of its header, its place there, its format."""


def _remove(found: dict[str, bytes], random: Random) -> None:
    found.pop(random.choice(list(found)))


def _resize(found: dict[str, bytes], random: Random, change: Callable[[bytes], bytes]) -> None:
    name = random.choice(list(found))
    found[name] = change(found[name])


def _flip(found: dict[str, bytes], random: Random) -> None:
    table = next(name for name in found if name.endswith("data.pkl"))
    data = bytearray(found[table])
    data[random.randrange(len(data))] = random.randrange(256)
    found[table] = bytes(data)


def _patch(file: bytes, random: Random, number: Number, value: int) -> bytes:
    """Replace a number of a local header, of a directory entry or of the end record."""
    signature, at, form = number
    places = [i for i in range(len(file)) if file.startswith(signature, i)]
    made = bytearray(file)
    if places:
        struct.pack_into(form, made, random.choice(places) + at, value)
    return bytes(made)


def _bomb(file: bytes, random: Random) -> bytes:
    """Replace data by 30 MB of zeros, deflated a thousandfold."""
    found = records(file)
    largest = max(found, key=lambda name: len(found[name]))
    return archive({**found, largest: bytes(30_000_000)}, zipfile.ZIP_DEFLATED)


HEADERS = (
    ("local", b"PK\x03\x04", {6: "<H", 8: "<H", 14: "<I", 18: "<I", 22: "<I", 26: "<H", 28: "<H"}),
    ("directory", b"PK\x01\x02", {8: "<H", 10: "<H", 16: "<I", 20: "<I", 24: "<I", 28: "<H", 30: "<H", 32: "<H",
    42: "<I"}),
    ("end", b"PK\x05\x06", {4: "<H", 8: "<H", 10: "<H", 12: "<I", 16: "<I", 20: "<H"}),
)  # fmt: skip
"""The numbers of a zip archive, by their place in their header."""


def _zips() -> None:
    for where, signature, numbers in HEADERS:
        for at, form in numbers.items():
            most = 2 ** (8 * struct.calcsize(form)) - 1
            for value in (0, 1, 8, most):
                number = signature, at, form
                add("zip", f"{where} +{at} = {value}", lambda file, random, number=number, value=value:
                    _patch(file, random, number, value), is_pickle)  # fmt: skip
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        add("zip", f"compressed {compression}", lambda file, random, kind=compression:
            archive(records(file), kind), is_pickle)  # fmt: skip
    add("zip", "a bomb", _bomb, is_pickle)
    add("zip", "gzip", lambda file, random: zlib.compress(file), is_pickle)
    for turn in range(3):
        record_mutation("zip", f"a record less {turn}", _remove)
        record_mutation(
            "zip", f"a shorter record {turn}", lambda found, random: _resize(found, random, lambda d: d[:-1])
        )
        record_mutation(
            "zip", f"a longer record {turn}", lambda found, random: _resize(found, random, lambda d: d + b"\0" * 9)
        )
        record_mutation("zip", f"an empty record {turn}", lambda found, random: _resize(found, random, lambda d: b""))
    for name in (
        "../../evil",
        "/evil",
        "archive/data/../0",
        "a\0b",
        "archive/DATA.PKL",
        "other/data.pkl",
        "\n",
        "x" * 60_000,
    ):
        record_mutation(
            "zip", f"a record called {label(name)}", lambda found, random, name=name: found.update({name: b"x"})
        )
    for value in (b"", b"big", b"little\n", b"x" * 100):
        record_mutation("zip", f"byteorder {value!r}"[:30], lambda found, random, value=value:
                        found.update({next(n for n in found if n.endswith("byteorder")): value}))  # fmt: skip
    record_mutation("zip", "other folder names", lambda found, random:
                    {f"{i}/{name.split('/', 1)[1]}": data for i, (name, data) in enumerate(found.items())})  # fmt: skip
    record_mutation("zip", "no records", lambda found, random: {"x": b""})


def _pickles() -> None:
    for name, table in _shell(f"touch {CANARY}").items():
        table_mutation("pickles that run code", name, lambda old, table=table: table)
        add("pickles that run code", f"{name}, bare", lambda file, random, table=table: table, is_pickle)
    for name, table in HOSTILE.items():
        table_mutation("hostile pickles", name, lambda old, table=table: table)
        add("hostile pickles", f"{name}, bare", lambda file, random, table=table: table, is_pickle)
    for name, table in LIES.items():
        table_mutation("lies about tensors", name, lambda old, table=table: table)
    for turn in range(30):
        record_mutation("hostile pickles", f"a byte of the table {turn}", _flip)
    for new in (b"\xed\xa0\x80", b"a\nb", b"\x1b[1", b"\0\0\0", b"../"):
        table_mutation("hostile pickles", f"names with {new!r}", lambda old, new=new: old.replace(b"wei", new))
        table_mutation(
            "hostile pickles",
            f"adapter called {new!r}",
            lambda old, new=new: old.replace(b".task.", b"." + new + b"k."),
        )
    table_mutation("hostile pickles", "the table twice", lambda old: old[:-1] + old[2:])
    table_mutation("hostile pickles", "the table cut", lambda old: old[: len(old) // 2])


_zips()
_pickles()
