"""Mutations of token ids, rows and fingerprint of a delta; the file around them stays valid."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from fuzz.mutations import add, is_safetensors, label
from fuzz.pairs import IDS, D, T, V, noise, of, safetensors
from fuzz.tensor_mutations import Parsed, unpack

INT32 = 2**31


def holds(part: str) -> Callable[[str, bytes], bool]:
    """Return a test for files with token ids and this part of the rows."""

    def suits(path: str, data: bytes) -> bool:
        if not is_safetensors(path, data):
            return False
        names = Parsed.of(data).names()
        return any(name.endswith(".token_ids") and name.removesuffix("token_ids") + part in names for name in names)

    return suits


def part_mutation(family: str, name: str, part: str, change: Callable[[T, Random], T]) -> None:
    """Add a mutation: `change` returns another tensor for the rows' `part`."""

    def make(file: bytes, random: Random) -> bytes:
        tensors = unpack(file)
        stem = next(name for name in tensors if name.endswith(".token_ids")).removesuffix("token_ids")
        tensors[stem + part] = change(tensors[stem + part], random)
        return safetensors(tensors)

    add(family, name, make, holds(part))


def _ids(tensor: T) -> np.ndarray:
    return np.frombuffer(tensor.data, "<i4").copy()


def _with(ids: np.ndarray, at: int, value: int) -> np.ndarray:
    ids[at] = value
    return ids


IDS_TO: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reversed": lambda ids: ids[::-1], "two exchanged": lambda ids: ids[[1, 0, *range(2, len(ids))]],
    "one repeated": lambda ids: _with(ids, 1, ids[0]), "all the same": lambda ids: ids * 0,
    "negative": lambda ids: _with(ids, 0, -1), "the smallest": lambda ids: _with(ids, 0, -INT32),
    "V": lambda ids: _with(ids, -1, V), "V + 1": lambda ids: _with(ids, -1, V + 1),
    "the largest": lambda ids: _with(ids, -1, INT32 - 1), "far": lambda ids: _with(ids, -1, 10**6),
    "others": lambda ids: ids - 1, "one less": lambda ids: ids[:-1], "one more": lambda ids: np.append(ids,
    ids[-1] + 1),
    "none": lambda ids: ids[:0], "big-endian": lambda ids: ids.byteswap(), "the first only": lambda ids: ids[:1],
    "twice": lambda ids: np.append(ids, ids), "0 to K": lambda ids: np.arange(len(ids), dtype="<i4"),
}  # fmt: skip
IDS_AS = {
    "I64": lambda ids: of(ids, "I64"), "F32": lambda ids: of(ids, "F32"), "U8": lambda ids: of(ids, "U8"),
    "I16": lambda ids: T("I16", ids.shape, ids.astype("<i2").tobytes()), "F64": lambda ids: of(ids, "F64"),
    "U32": lambda ids: T("U32", ids.shape, ids.tobytes()), "BOOL": lambda ids: T("BOOL", ids.shape, b"\1" * len(ids)),
    "a matrix": lambda ids: of(ids[None], "I32"), "a column": lambda ids: of(ids[:, None], "I32"),
    "a scalar": lambda ids: of(ids[0], "I32"), "I64, far": lambda ids: of([*ids[:-1], 2**62], "I64"),
    "I64, the largest": lambda ids: of([*ids[:-1], 2**63 - 1], "I64"),
    "I64, the whole range": lambda ids: of([-(2**63), *ids[1:-1], 2**63 - 1], "I64"),
    "I64, the smallest": lambda ids: of([-(2**63), *ids[1:]], "I64"),
}  # fmt: skip


def _fill(tensor: T, value: float) -> T:
    values = np.frombuffer(tensor.data, "<f4").reshape(tensor.shape).copy()
    values[1] = value
    return of(values)


WEIGHT_TO: dict[str, Callable[[T], T]] = {
    **{f"width {n}": lambda t, n=n: of(noise(len(IDS), n)) for n in (0, 1, D - 1, D + 1, 2 * D)},
    **{f"{n} rows": lambda t, n=n: of(noise(n, D)) for n in (0, 1, len(IDS) - 1, len(IDS) + 1, V, 2 * V)},
    **{f"filled with {x}": lambda t, x=x: _fill(t, x)
       for x in (float("nan"), float("inf"), -float("inf"), 1e-45, 3e38, -3e38, 0.0, -0.0)},
    **{f"as {kind}": lambda t, kind=kind: of(np.frombuffer(t.data, "<f4").reshape(t.shape), kind)
       for kind in ("F64", "F16", "BF16", "I32", "I64", "U8")},
    "too large": lambda t: of(np.full(t.shape, 1e300), "F64"), "NaN as F64": lambda t: of(np.full(t.shape, np.nan),
    "F64"),
    "flat": lambda t: T(t.dtype, (len(t.data) // 4,), t.data), "a cube": lambda t: T(t.dtype, (1, *t.shape), t.data),
    "a scalar": lambda t: of(1.0), "transposed": lambda t: T(t.dtype, t.shape[::-1], t.data),
    "all bits set": lambda t: T(t.dtype, t.shape, b"\xff" * len(t.data)),
    "float8": lambda t: T("F8_E4M3", t.shape, t.data[::4]), "C64": lambda t: T("C64", t.shape, t.data * 2),
}  # fmt: skip


def _rows() -> None:
    for name, change in IDS_TO.items():
        part_mutation("token ids", name, "token_ids", lambda t, random, change=change: of(change(_ids(t)), "I32"))
    for name, change in IDS_AS.items():
        part_mutation("token ids", f"as {name}", "token_ids", lambda t, random, change=change: change(_ids(t)))
    for name, change in WEIGHT_TO.items():
        part_mutation("rows", name, "weight", lambda t, random, change=change: change(t))
    add("rows", "neither rows nor ids", _empty, holds("weight"))


def _empty(file: bytes, random: Random) -> bytes:
    tensors = unpack(file)
    stem = next(name for name in tensors if name.endswith(".token_ids")).removesuffix("token_ids")
    tensors |= {stem + "token_ids": of([], "I32"), stem + "weight": of(np.zeros((0, D)))}
    return safetensors(tensors)


def _as_tensor(data: bytes) -> T:
    return T("U8", (len(data),), data)


DEEP = 100_000
PRINTS = (b"", b"x", b"null", b"1", b'"x"', b"[]", b"{}", b"\xff\xfe", b"[" * DEEP, b'{"a":' * DEEP, b"\0" * 64, b"NaN",
          b"{" + b",".join(b'"%d":1' % i for i in range(DEEP)) + b"}")  # fmt: skip
VALUES = (None, True, 0, -1, 1, 1.5, 1e308, 2**31, 2**62, 2**63, 2**64, 10**12, 10**30, 10**4000, "", "x", "..", "a\nb",
          "\ud800", "x" * 100_000, [], [1], {}, {"a": 1}, [[[]]], float("nan"))  # fmt: skip
TENSORS = (None, [], [[4, 4]], [[4, 4], "x", 1], [4, "x"], ["44", "x"], [[-1], "x"], [[2**63], "x"], [[10**30], "x"],
           [[1.5], "x"], [["4"], "x"], [[True], "x"], [[4, 4], 1], [[4, 4], None], [None, "x"], "ab", {"a": 1, "b": 2},
           1,
           [[], ""], [[1] * 1000, "x"], [[4, 4], "x" * 100_000], [[[4], 4], "x"])  # fmt: skip
FIELDS = ("embedding", "prefix", "vocab_size", "base_vocab_size", "rows", "tensors")


def print_mutation(name: str, change: Callable[[dict[str, Any], Random], Any]) -> None:
    """Add a mutation: `change` alters the fingerprint's JSON."""

    def changed(tensor: T, random: Random) -> T:
        found = json.loads(tensor.data)
        change(found, random)
        return _as_tensor(json.dumps(found).encode())

    part_mutation("fingerprint", name, "fingerprint", changed)


def _set_tensor(found: dict[str, Any], random: Random, value: Any) -> None:
    found["tensors"][random.choice(list(found["tensors"]))] = value


def _rename_tensor(found: dict[str, Any], random: Random, name: str) -> None:
    found["tensors"][name] = found["tensors"].pop(random.choice(list(found["tensors"])))


def _fingerprints() -> None:
    for data in PRINTS:
        part_mutation("fingerprint", label(data), "fingerprint", lambda t, random, data=data: _as_tensor(data))
    for kind in ("I32", "F32", "BF16"):
        part_mutation("fingerprint", f"as {kind}", "fingerprint", lambda t, random, kind=kind:
                      of(np.frombuffer(t.data, "u1"), kind))  # fmt: skip
    for field in FIELDS:
        print_mutation(f"without {field}", lambda found, random, field=field: found.pop(field))
        for value in VALUES:
            print_mutation(f"{field} = {label(value)}", lambda found, random, field=field, value=value:
                           found.update({field: value}))  # fmt: skip
    for size in (V - 1, V + 1, V + 2, V + 4, 2 * V):
        print_mutation(f"vocab_size = {size}", lambda found, random, size=size: found.update(vocab_size=size))
        print_mutation(f"base_vocab_size = {size}", lambda found, random, size=size: found.update(base_vocab_size=size))
    print_mutation("a field more", lambda found, random: found.update(extra=1))
    for value in TENSORS:
        print_mutation(
            f"a tensor = {label(value)}", lambda found, random, value=value: _set_tensor(found, random, value)
        )
    for name in ("", "x", "a\nb", "\ud800", "cls.predictions.bias", "x" * 100_000):
        print_mutation(f"a tensor called {label(name)}", lambda found, random, name=name:
                       _rename_tensor(found, random, name))  # fmt: skip
    for name in ("encoder.layer.0.attention.self.query.weight", "pooler.dense.bias", "embeddings.position_ids", "bert"):
        print_mutation(f"embedding is {name}", lambda found, random, name=name: found.update(embedding=name))


_rows()
_fingerprints()
