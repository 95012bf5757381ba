"""Mutations of safetensors files: of the header as text, of single entries, of whole tensors."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from fuzz.mutations import add, is_safetensors, label
from fuzz.pairs import T, of, safetensors


@dataclass
class Parsed:
    """A parsed file: `entries` as pairs, so that names may repeat."""

    entries: list[list[Any]]
    data: bytes

    @classmethod
    def of(cls, file: bytes) -> "Parsed":
        end = 8 + int.from_bytes(file[:8], "little")
        return cls([list(item) for item in json.loads(file[8:end]).items()], file[end:])

    def encode(self) -> bytes:
        text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in self.entries) + "}"
        return frame(text.encode(), self.data)

    def names(self) -> set[str]:
        return {name for name, _ in self.tensors()}

    def tensors(self) -> list[list[Any]]:
        return [item for item in self.entries if item[0] != "__metadata__"]


def frame(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def unpack(file: bytes) -> dict[str, T]:
    """Return the tensors of a valid file."""
    parsed = Parsed.of(file)
    return {name: T(entry["dtype"], tuple(entry["shape"]), parsed.data[slice(*entry["data_offsets"])])
            for name, entry in parsed.tensors()}  # fmt: skip


def entry_mutation(family: str, name: str, change: Callable[[list[Any], Parsed, Random], Any]) -> None:
    """Add a mutation: `change` alters one `[name, entry]` of the header."""

    def make(file: bytes, random: Random) -> bytes:
        parsed = Parsed.of(file)
        change(random.choice(parsed.tensors()), parsed, random)
        return parsed.encode()

    add(family, name, make, is_safetensors)


def set_field(family: str, field: str, value: Any) -> None:
    def change(item: list[Any], parsed: Parsed, random: Random) -> None:
        item[1][field] = value

    entry_mutation(family, f"{field} = {label(value)}", change)


def text_mutation(name: str, change: Callable[[bytes], bytes]) -> None:
    """Add a mutation: `change` alters the text of the header."""

    def make(file: bytes, random: Random) -> bytes:
        end = 8 + int.from_bytes(file[:8], "little")
        return frame(change(file[8:end]), file[end:])

    add("header text", name, make, is_safetensors)


def tensor_mutation(family: str, name: str, change: Callable[[dict[str, T], str, Random], Any]) -> None:
    """Add a mutation: `change` alters the tensors, given the name of one; the file is rewritten consistently."""

    def make(file: bytes, random: Random) -> bytes:
        tensors = unpack(file)
        change(tensors, random.choice(list(tensors)), random)
        return safetensors(tensors)

    add(family, name, make, is_safetensors)


def _lengths() -> None:
    for value in (0, 1, 2, 7, 8, 10**8, 10**8 + 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1):
        add("header length", str(value), lambda file, random, value=value: value.to_bytes(8, "little") + file[8:],
            is_safetensors)  # fmt: skip
    for text, change in (("n - 1", lambda n, size: n - 1), ("n + 1", lambda n, size: n + 1),
    ("n + 8", lambda n, size: n + 8),
                         ("2 n", lambda n, size: 2 * n), ("size", lambda n, size: size),
                         ("size - 8", lambda n, size: size - 8), ("size - 7", lambda n, size: size - 7)):  # fmt: skip
        add("header length", text, lambda file, random, change=change:
            change(int.from_bytes(file[:8], "little"), len(file)).to_bytes(8, "little") + file[8:],
            is_safetensors)  # fmt: skip


DEEP = 100_000
TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"", "spaces": lambda text: b" " * 64, "a list": lambda text: b"[" + text + b"]",
    "null": lambda text: b"null", "a number": lambda text: b"1", "a string": lambda text: b'"x"',
    "an empty object": lambda text: b"{}", "a space before": lambda text: b" " + text,
    "a newline before": lambda text: b"\n" + text, "newlines after": lambda text: text + b"\n\n",
    "zeros after": lambda text: text + b"\0" * 8, "twice": lambda text: text + text,
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text, "UTF-16": lambda text: text.decode().encode("utf-16"),
    "bad UTF-8": lambda text: text.replace(b"weight", b"w\xffight", 1),
    "single quotes": lambda text: text.replace(b'"', b"'"), "a comma more": lambda text: text[:-1] + b",}",
    "a comment": lambda text: text + b"//", "brackets": lambda text: b"[" * DEEP,
    "deep": lambda text: b'{"a":' * DEEP + b"1" + b"}" * DEEP, "deep metadata": lambda text:
    b'{"__metadata__":' + b"[" * 900 + b"]" * 900 + b"," + text[1:], "deep entry": lambda text:
    b'{"x":' + b"[" * 900 + b"]" * 900 + b"," + text[1:], "NaN": lambda text: text.replace(b"[0,", b"[NaN,", 1),
    "Infinity": lambda text: text.replace(b"[0,", b"[Infinity,", 1), "-0": lambda text: text.replace(b"[0,", b"[-0,"),
    "5000 digits": lambda text: text.replace(b"[0,", b"[" + b"9" * 5000 + b","),
    "1e400": lambda text: text.replace(b"[0,", b"[1e400,"), "00": lambda text: text.replace(b"[0,", b"[00,"),
    "a control character": lambda text: text.replace(b"weight", b"w\teight"),
}  # fmt: skip


def _shifts() -> None:
    for begin, end in ((0, 1), (1, 0), (-1, 0), (-1, -1), (1, 1), (-4, -4), (4, 4), (0, 4), (0, -4), (0, 2**40)):

        def change(item: list[Any], parsed: Parsed, random: Random, begin: int = begin, end: int = end) -> None:
            offsets = item[1]["data_offsets"]
            item[1]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

        entry_mutation("offsets", f"begin {begin:+}, end {end:+}", change)


def _exchange(item: list[Any], parsed: Parsed, random: Random) -> None:
    other = random.choice(parsed.tensors())
    item[1]["data_offsets"], other[1]["data_offsets"] = other[1]["data_offsets"], item[1]["data_offsets"]


def _same(item: list[Any], parsed: Parsed, random: Random) -> None:
    item[1]["data_offsets"] = random.choice(parsed.tensors())[1]["data_offsets"]


def _behind(item: list[Any], parsed: Parsed, random: Random) -> None:
    begin, end = item[1]["data_offsets"]
    item[1]["data_offsets"] = [len(parsed.data), len(parsed.data) + end - begin]


ODD = (None, True, "ab", {}, {"a": 1}, [], [0], [0, 0, 0], ["0", "4"], [0.0, 4.0], [True, False], [[0], [4]],
       [None, None], [0, 1e308], [-1, 4], [-(2**63), 0], [0, 2**63], [0, 2**64], [2**64 - 1, 3],
       [0, 10**400])  # fmt: skip
SHAPES = ([0], [], [-1], [-4, -4], [2**62], [2**63], [2**64], [1] * 64, [1] * 65, [1] * 10_000, [0, 2**62],
          [2**32, 2**32, 0], [2**31] * 64, [4.0, 4.0], ["4", "4"], [None], [[4], [4]], [True, True], None, "44", 16, {},
          [10**400], [0] * 64)  # fmt: skip
DTYPES = ("F8_E4M3", "F4", "F6_E2M3", "f32", "F32 ", "", None, 1, ["F32"], {"F32": 1}, "I8", "I16", "I32", "I64", "U8",
          "U32", "BOOL", "C64", "F128", "F16", "BF16", "F64", "\U0001f600", "A" * 100_000, "F8_E8M0")  # fmt: skip


def _entries() -> None:
    for value in ODD:
        set_field("offsets", "data_offsets", value)
    _shifts()
    for name, change in (("exchanged", _exchange), ("the same twice", _same), ("behind the end", _behind)):
        entry_mutation("offsets", name, change)
    for value in SHAPES:
        set_field("shape", "shape", value)
    for value in DTYPES:
        set_field("dtype", "dtype", value)
    for value in (None, [], 1, "x", {}, [1, 2, 3], {"dtype": "F32"}):

        def replace(item: list[Any], parsed: Parsed, random: Random, value: Any = value) -> None:
            item[1] = value

        entry_mutation("entry", label(value), replace)
    for field in ("dtype", "shape", "data_offsets"):
        entry_mutation("entry", f"without {field}", lambda item, parsed, random, field=field: item[1].pop(field))
    entry_mutation("entry", "a field more", lambda item, parsed, random: item[1].update(extra=1))


METADATA = (None, [], "x", 1, {}, {"format": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}, {"format": "tf"},
            {"a": "x" * 1_000_000}, {"\ud800": "\ud800"}, {"a": "\n"}, {"format": "pt", "": ""})  # fmt: skip


def _set_metadata(item: list[Any], parsed: Parsed, value: Any) -> None:
    parsed.entries = [["__metadata__", value], *parsed.tensors()]


def _texts() -> None:
    for name, change in TEXTS.items():
        text_mutation(name, change)
    for value in METADATA:
        entry_mutation("metadata", label(value), lambda item, parsed, random, value=value:
                       _set_metadata(item, parsed, value))  # fmt: skip
    entry_mutation("metadata", "a tensor", lambda item, parsed, random: _set_metadata(item, parsed, item[1]))
    entry_mutation("names", "twice", lambda item, parsed, random: parsed.entries.append(list(item)))
    entry_mutation("names", "twice, other place", lambda item, parsed, random:
                   parsed.entries.append([item[0], {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}]))  # fmt: skip
    entry_mutation("names", "that of another", lambda item, parsed, random:
                   item.__setitem__(0, random.choice(parsed.tensors())[0]))  # fmt: skip


NAMES = ("", " ", ".", "..", "../x", "/etc/passwd", "\0", "a\nb", "a\rb", "\x1b[31mred", "\u2028", "\ud800", "é",
"\U0001f600", "x" * 100_000,
         "__metadata__", "classifier.weight", "embeddings.word_embeddings.weight", "bert.bert.x",
         "cls.predictions.bias",
         "lm_head.weight", "x.token_ids", "bert.pema.adapters.other.weight", "pema.adapters.task.weight",
         "bert.pema.adapters.a\nb.token_ids", "bert.pema.adapters.\ud800.token_ids", "bert.pema.adapters..weight",
         "bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.token_ids",
         "bert.embeddings.word_embeddings.fingerprint", "encoder.embed_tokens.weight")  # fmt: skip


def _rename(tensors: dict[str, T], old: str, new: str) -> None:
    made = {new if name == old else name: tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(made)


def _rename_adapter(tensors: dict[str, T], new: str) -> None:
    made = {name.replace(".task.", f".{new}."): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(made)


MORE = (of(0.5), of([]), of([1.0]), of(list(range(40)), "I64"), T("BOOL", (3,), b"\0\1\2"), T("F4", (3,), b"\0\1"),
        T("F8_E5M2", (2,), b"\x7c\x7f"), T("C64", (1,), b"\xff" * 8), T("U16", (1,), b"\0\0"), of([[float("nan")]]),
        T("F6_E2M3", (4,), b"\0\0\0"), T("F32", (0, 2**62), b""), of([[0.0] * 4] * 40), T("I8", (), b"\0"))  # fmt: skip


def _tensors() -> None:
    tensor_mutation("tensors", "one removed", lambda tensors, name, random: tensors.pop(name))
    tensor_mutation("tensors", "all but one removed", lambda tensors, name, random:
                    [tensors.pop(other) for other in list(tensors) if other != name])  # fmt: skip
    tensor_mutation("tensors", "all removed", lambda tensors, name, random: tensors.clear())
    tensor_mutation("tensors", "moved to the end", lambda tensors, name, random:
                    tensors.update({name: tensors.pop(name)}))  # fmt: skip
    for new in NAMES:
        tensor_mutation("names", f"renamed {label(new)}", lambda tensors, name, random, new=new:
                        _rename(tensors, name, new))  # fmt: skip
        tensor_mutation("names", f"one more {label(new)}", lambda tensors, name, random, new=new:
                        tensors.setdefault(new, random.choice((tensors[name], of([1.0])))))  # fmt: skip
    tensor_mutation("names", "one more with or without prefix", lambda tensors, name, random: tensors.setdefault(
        name.removeprefix("bert.") if name.startswith("bert.") else "bert." + name, tensors[name]))  # fmt: skip
    tensor_mutation("names", "one more, in older spelling", lambda tensors, name, random: tensors.setdefault(
        "bert.encoder.layer.0.output.LayerNorm.weight", of([1.0] * 4)))  # fmt: skip
    for new in ("..", "a/b", "/x", "a\nb", "\0", "\ud800", "", " ", "a b", "é", "x" * 300, "x" * 100_000, "C:", "CON"):
        tensor_mutation("names", f"adapter renamed {label(new)}", lambda tensors, name, random, new=new:
                        _rename_adapter(tensors, new))  # fmt: skip
    for index, tensor in enumerate(MORE):
        tensor_mutation("tensors", f"one more, {index} {tensor.dtype}{list(tensor.shape)}",
                        lambda tensors, name, random, tensor=tensor: tensors.update({"bert.more": tensor}))  # fmt: skip
        tensor_mutation("tensors", f"one replaced, {index} {tensor.dtype}{list(tensor.shape)}",
                        lambda tensors, name, random, tensor=tensor: tensors.update({name: tensor}))  # fmt: skip
    for name, change in RESHAPES.items():
        tensor_mutation("tensors", name, lambda tensors, name, random, change=change:
                        tensors.update({name: change(tensors[name])}))  # fmt: skip
    for count in (1_000, 30_000):
        tensor_mutation("tensors", f"{count} more", lambda tensors, name, random, count=count:
                        tensors.update({f"more.{i}": T("U8", (0,), b"") for i in range(count)}))  # fmt: skip


RESHAPES: dict[str, Callable[[T], T]] = {
    "shape reversed": lambda t: T(t.dtype, t.shape[::-1], t.data),
    "flattened": lambda t: T(t.dtype, (-(-len(t.data) // max(1, _width(t))),), t.data),
    "a dimension more": lambda t: T(t.dtype, (1, *t.shape), t.data),
    "a dimension more behind": lambda t: T(t.dtype, (*t.shape, 1), t.data),
    "as bytes": lambda t: T("U8", (len(t.data),), t.data),
    "as float8": lambda t: T("F8_E4M3", (*t.shape, _width(t)), t.data),
    "float8 of the same shape": lambda t: T("F8_E4M3", t.shape, t.data[:: _width(t)]),
    "C64 of the same shape": lambda t: T("C64", t.shape, b"\1" * (8 * len(t.data) // _width(t))),
    "int64 of the same shape": lambda t: T("I64", t.shape, b"\1" * (8 * len(t.data) // _width(t))),
    "a scalar": lambda t: T(t.dtype, (), t.data[: _width(t)]),
    "without rows": lambda t: T(t.dtype, (0, *t.shape[1:]), b""),
    "without columns": lambda t: T(t.dtype, (*t.shape[:1], 0), b""),
    "a row less": lambda t: T(t.dtype, (t.shape[0] - 1, *t.shape[1:]),
    t.data[: -(len(t.data) // t.shape[0])]) if t.shape else t,
    "a row more": lambda t: T(t.dtype, (t.shape[0] + 1, *t.shape[1:]),
    t.data + t.data[: len(t.data) // t.shape[0]]) if t.shape else t,
    "all bits set": lambda t: T(t.dtype, t.shape, b"\xff" * len(t.data)),
    "zeros": lambda t: T(t.dtype, t.shape, bytes(len(t.data))),
    "infinity": lambda t: of(np_full(t, float("inf"))) if t.dtype == "F32" else t,
}  # fmt: skip


def np_full(tensor: T, value: float) -> Any:
    import numpy as np

    return np.full(tensor.shape, value)


def _width(tensor: T) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return len(tensor.data) // count if count else 1


_lengths()
_texts()
_entries()
_tensors()
