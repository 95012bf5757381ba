"""The registry of mutations, and mutations that suit any file.

A mutation takes the bytes of one input file and gives what lies there instead: other bytes, a link, a pipe, a folder,
nothing. Mutation number `i` of a seed is always the same, so a number is all it takes to see an escape again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from random import Random
from typing import Any

from fuzz.pairs import Files, Folder, Link, Node, Pipe

Make = Callable[[bytes, Random], "Node | None"]


@dataclass(frozen=True)
class Mutation:
    """A mutation: `make` returns the replacement of a file; `suits` tells its files, by path and content."""

    family: str
    name: str
    make: Make
    suits: Callable[[str, bytes], bool]


MUTATIONS: list[Mutation] = []
MODULES = ("fuzz.tensor_mutations", "fuzz.row_mutations", "fuzz.json_mutations", "fuzz.pickle_mutations")
"""Each adds its mutations when it is imported."""


def add(family: str, name: str, make: Make, suits: Callable[[str, bytes], bool]) -> None:
    MUTATIONS.append(Mutation(family, name, make, suits))


def is_safetensors(path: str, data: bytes) -> bool:
    return path.endswith(".safetensors")


def is_json(path: str, data: bytes) -> bool:
    return path.endswith(".json")


def is_pickle(path: str, data: bytes) -> bool:
    return path.endswith(".bin")


def is_any(path: str, data: bytes) -> bool:
    return True


def label(value: Any) -> str:
    """Return a short name of a value."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)})"


@dataclass(frozen=True)
class Options:
    """Options of a merge; `path`: the mutated file."""

    path: str = "base/"
    allow_base_mismatch: bool = False
    verify: bool = False
    by_command: bool = False
    dtype: str = "auto"
    fold: bool = True
    in_place: bool = False

    @classmethod
    def draw(cls, random: Random, path: str, allow_base_mismatch: bool) -> "Options":
        allow = allow_base_mismatch or random.random() < 0.5
        verify, by_command, fold, in_place = (random.random() < share for share in (0.2, 0.2, 0.8, 0.15))
        if by_command:  # it hands the others over as they are
            return cls(path, allow, verify, by_command)
        dtype = "auto" if in_place or random.random() < 0.7 else random.choice(("float32", "bfloat16", "float16"))
        return cls(path, allow, verify, by_command, dtype, fold, in_place)


@dataclass(frozen=True)
class Case:
    """One mutated pair of inputs, and the options of its merge."""

    number: int
    pair: str
    mutation: Mutation
    files: Files
    options: Options

    @property
    def name(self) -> str:
        """Describe the case in words."""
        return f"#{self.number} [{self.pair}] {self.options.path}: {self.mutation.family}: {self.mutation.name}"


def order(seed: int, family: str | None = None) -> list[Mutation]:
    """Return all mutations (of a family), shuffled: the first `n` cases are a fair sample for any `n`."""
    for module in MODULES:
        import_module(module)
    chosen = [mutation for mutation in MUTATIONS if family is None or mutation.family == family]
    Random(seed).shuffle(chosen)
    return chosen


def make_case(pairs: dict[str, Files], mutations: list[Mutation], seed: int, number: int) -> Case:
    """Make case `number` of `seed`: first each mutation once, then each family in turn."""
    random = Random(f"{seed}:{number}")
    if number < len(mutations):
        mutation = mutations[number]
    else:
        family = random.choice(sorted({mutation.family for mutation in mutations}))
        mutation = random.choice([mutation for mutation in mutations if mutation.family == family])
    places = [(pair, path) for pair, files in pairs.items() for path, data in files.items()
              if isinstance(data, bytes) and mutation.suits(path, data)]  # fmt: skip
    pair, path = random.choice(places)
    original = pairs[pair][path]
    assert isinstance(original, bytes)
    made = mutation.make(original, random)
    files = {name: node for name, node in pairs[pair].items() if name != path}
    if made is not None:
        files[path] = made
    return Case(number, pair, mutation, files, Options.draw(random, path, "no fingerprint" in pair))


def _cut(name: str, at: Callable[[bytes, Random], int]) -> None:
    add("truncation", name, lambda data, random: data[: max(0, at(data, random))], is_any)


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _truncations() -> None:
    for place in (0, 1, 2, 4, 7, 8, 9, 10):
        _cut(f"to {place} bytes", lambda data, random, place=place: place)
    for less in (1, 2, 4, 8, 16, 22, 64):
        _cut(f"by {less} bytes", lambda data, random, less=less: len(data) - less)
    for near in (-1, 0, 1):
        add("truncation", f"at the end of the header {near:+}",
            lambda data, random, near=near: data[: _header_end(data) + near], is_safetensors)  # fmt: skip
    for turn in range(6):
        _cut(f"anywhere {turn}", lambda data, random: random.randrange(len(data)))


def _flip(data: bytes, random: Random, count: int, begin: int = 0, end: int | None = None) -> bytes:
    made = bytearray(data)
    end = min(len(made), end or len(made))
    for _ in range(count):
        made[random.randrange(min(begin, end - 1), end)] ^= 1 << random.randrange(8)
    return bytes(made)


def _blind() -> None:
    for count in (1, 1, 1, 2, 3, 8, 64):
        add("flipped bits", f"{count} anywhere", lambda data, random, count=count: _flip(data, random, count), is_any)
    for count in (1, 1, 1, 1, 2, 4):
        add("flipped bits", f"{count} in the header", lambda data, random, count=count:
            _flip(data, random, count, 8, _header_end(data)), is_safetensors)  # fmt: skip
        add("flipped bits", f"{count} in the data", lambda data, random, count=count:
            _flip(data, random, count, _header_end(data)), is_safetensors)  # fmt: skip
    for name, byte in (("zeros", b"\0"), ("0xff", b"\xff"), ("spaces", b" "), ("quotes", b'"'), ("brackets", b"[")):
        add(
            "blocks",
            f"overwritten with {name}",
            lambda data, random, byte=byte: _overwritten(data, random, byte),
            is_any,
        )
        add("blocks", f"inserted {name}", lambda data, random, byte=byte: _insert(data, random, byte * 8), is_any)
        add(
            "blocks",
            f"appended {name}",
            lambda data, random, byte=byte: data + byte * random.choice((1, 8, 64)),
            is_any,
        )
        add("blocks", f"prepended {name}", lambda data, random, byte=byte: byte * random.choice((1, 8)) + data, is_any)
        add("blocks", f"nothing but {name}", lambda data, random, byte=byte: byte * len(data), is_any)
    add("blocks", "twice", lambda data, random: data + data, is_any)
    add("blocks", "halves exchanged", lambda data, random: data[len(data) // 2 :] + data[: len(data) // 2], is_any)
    add("blocks", "reversed", lambda data, random: data[::-1], is_any)
    add("blocks", "random bytes", lambda data, random: random.randbytes(len(data)), is_any)
    for turn in range(3):
        add("blocks", f"a piece removed {turn}", _remove, is_any)
        add("blocks", f"a piece repeated {turn}", _repeat, is_any)


def _overwritten(data: bytes, random: Random, byte: bytes) -> bytes:
    begin = random.randrange(len(data))
    length = min(random.choice((1, 4, 8, 32)), len(data) - begin)
    return data[:begin] + byte * length + data[begin + length :]


def _insert(data: bytes, random: Random, block: bytes) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + block + data[at:]


def _remove(data: bytes, random: Random) -> bytes:
    begin = random.randrange(len(data))
    return data[:begin] + data[begin + random.choice((1, 4, 8, 32)) :]


def _repeat(data: bytes, random: Random) -> bytes:
    begin = random.randrange(len(data))
    return data[:begin] + data[begin : begin + random.choice((1, 4, 8, 32))] + data[begin:]


LINKS = {
    "a broken link": "/nonexistent/file", "a link to the case": "{case}", "a link to the base": "{case}/base",
    "/dev/null": "/dev/null", "/dev/zero": "/dev/zero", "/dev/full": "/dev/full", "/dev/tty": "/dev/tty",
    "/proc/self/mem": "/proc/self/mem", "/proc/self/maps": "/proc/self/maps", "/etc/hostname": "/etc/hostname",
    "a link to the config": "{case}/base/config.json",
}  # fmt: skip


def _nodes() -> None:
    def constant(node: Node | None) -> Make:
        return lambda data, random: node

    kinds: Iterable[tuple[str, Node | None]] = [
        ("nothing", None), ("empty", b""), ("a folder", Folder()), ("a pipe", Pipe()),
        *((name, Link(target)) for name, target in LINKS.items()),
    ]  # fmt: skip
    for name, node in kinds:
        for turn in range(2):
            add("other kinds of file", f"{name} {turn}", constant(node), is_any)
    add("other kinds of file", "a link that leads to itself", constant(Link("{case}/delta/loop")), is_any)


_truncations()
_blind()
_nodes()
