"""Mutations of JSON files: as text, and field by field."""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from fuzz.mutations import add, is_json, label

DEEP = 100_000


def nest(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"", "spaces": lambda text: b"  \n", "null": lambda text: b"null",
    "a list": lambda text: b"[]",
    "a number": lambda text: b"1", "a string": lambda text: b'"x"', "true": lambda text: b"true",
    "NaN": lambda text: b"NaN",
    "an empty object": lambda text: b"{}", "in a list": lambda text: b"[" + text + b"]",
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text, "UTF-16": lambda text: text.decode().encode("utf-16"),
    "UTF-32": lambda text: text.decode().encode("utf-32"), "bad UTF-8": lambda text: text.replace(b"a", b"\xff", 1),
    "single quotes": lambda text: text.replace(b'"', b"'"), "a comma more": lambda text: text[:-1] + b",}",
    "a comment": lambda text: b"// x\n" + text, "twice": lambda text: text + text, "brackets": lambda text: b"[" * DEEP,
    "deep": lambda text: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a deep field": lambda text: text.rstrip()[:-1] + b',"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "many fields": lambda text: text.rstrip()[:-1] + b"," + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}",
    "a long number": lambda text: text.rstrip()[:-1] + b',"a":' + b"9" * 5000 + b"}",
    "an infinite number": lambda text: text.rstrip()[:-1] + b',"a":1e999}',
    "a control character": lambda text: text.rstrip()[:-1] + b',"a":"\n"}',
    "a half character": lambda text: text.rstrip()[:-1] + b',"a":"\\ud800"}',
    "a field twice": lambda text: text.rstrip()[:-1] + b"," + text.lstrip()[1:],
}  # fmt: skip
for _depth in (100, 200, 300, 450, 600, 900, 960, 985):
    TEXTS[f"a field {_depth} deep"] = lambda text, n=_depth: text.rstrip()[:-1] + b',"a":' + b"[" * n + b"]" * n + b"}"

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**12, 10**30, 1e12, 1.5, 1e308, float("nan"), float("inf"), "", "x",
    "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\nb", "\0", "\ud800", "é", "x" * 300, "x" * 100_000, [], [1], [None],
    ["x"],
    {}, {"a": 1}, {"": None}, {"x": {"x": {}}}, nest(50), nest(400), nest(900), "config.json", ".",
)  # fmt: skip
FIELDS: dict[str, tuple[str, ...]] = {
    "base/config.json": ("model_type", "architectures", "tie_word_embeddings", "vocab_size", "id2label", "label2id",
                         "hidden_size", "num_labels", "problem_type", "dtype"),
    "delta/config.json": ("architectures", "id2label", "label2id", "problem_type", "vocab_size", "model_type"),
    "adapter_config.json": ("config", "name", "model_type", "model_class", "hidden_size", "version"),
    "head_config.json": ("config", "name", "model_class", "label2id", "num_labels", "model_type"),
    ".index.json": ("weight_map", "metadata"),
}  # fmt: skip
"""The fields that a merge reads, by the end of the file's path."""


def change_json(family: str, name: str, change: Callable[[Any, Random], Any], ending: str = ".json") -> None:
    """Add a mutation: `change` alters the content of files whose path ends so."""

    def make(text: bytes, random: Random) -> bytes:
        content = json.loads(text)
        changed = change(content, random)
        return json.dumps(content if changed is None else changed).encode()

    add(family, name, make, lambda path, data: path.endswith(ending) and data.lstrip().startswith(b"{"))


def _set(field: str, value: Any) -> Callable[[Any, Random], Any]:
    return lambda content, random: content.update({field: value})


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield `(container, key)` of every value inside."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from places(value)


def _anywhere(value: Any) -> Callable[[Any, Random], Any]:
    def change(content: Any, random: Random) -> None:
        container, key = random.choice(list(places(content)))
        container[key] = value

    return change


def _without(content: Any, random: Random) -> None:
    container, key = random.choice(list(places(content)))
    del container[key]


def _rename(content: Any, random: Random, name: str) -> None:
    container, key = random.choice([(c, k) for c, k in places(content) if isinstance(c, dict)])
    container[name] = container.pop(key)


def _fields() -> None:
    for name, change in TEXTS.items():
        add("JSON text", name, lambda text, random, change=change: change(text), is_json)
    for ending, fields in FIELDS.items():
        for field in fields:
            for value in VALUES:
                change_json("JSON fields", f"{field} = {label(value)}", _set(field, value), ending)
    for value in VALUES:
        change_json("JSON anywhere", f"= {label(value)}", _anywhere(value))
    for turn in range(10):
        change_json("JSON anywhere", f"one removed {turn}", _without)
    for name in ("", "x", "a\nb", "\0", "\ud800", "x" * 100_000):
        change_json("JSON anywhere", f"renamed {label(name)}", lambda content, random, name=name:
                    _rename(content, random, name))  # fmt: skip


MEMBERS: tuple[Any, ...] = (
    "pema", ["pema"], {"architecture": "pema"}, {"configs": ["pema", "lora"]}, {"configs": {"0": "pema"}},
    {"configs": 1},
    {"configs": [None, 1, []]}, {"configs": nest(900)}, {"configs": [{"architecture": "union", "configs": ["pema"]}]},
    {"architecture": {"pema": 1}}, {"architecture": ["pema"]}, {"configs": ["pema"] * 1000}, {"configs": ["pema", {}]},
    {"architecture": "lora", "r": "8", "alpha": "x"}, {"architecture": "lora", "r": 0},
    {"architecture": "lora", "r": 10**30},
    {"configs": ["pema", {"architecture": "lora", "r": 2, "alpha": 1e308}]},
    {"configs": ["pema", {"architecture": "lora", "r": 2, "alpha": float("nan")}]},
    {"configs": ["pema", {"architecture": "lora", "r": "2", "alpha": []}]},
    {"configs": ["pema", {"architecture": "lora", "r": -1, "alpha": 4}]},
    {"configs": ["pema", {"architecture": "lora", "r": 2, "alpha": 4, "use_gating": True}]},
    {"configs": ["pema", {"architecture": "lora", "r": 2, "alpha": 4, "composition_mode": "scale"}]},
    {"configs": ["pema", {"architecture": "lora", "r": 2, "alpha": 4, "attn_matrices": 1}]},
    {"configs": ["pema", {"architecture": "lora", "r": 2, "alpha": 4, "use_dora": True}]},
)  # fmt: skip
LABELS: tuple[dict[str, Any], ...] = (
    {"num_labels": 10**12}, {"num_labels": 10**12, "label2id": None}, {"num_labels": -1, "label2id": None},
    {"num_labels": 10**6, "label2id": None}, {"num_labels": True, "label2id": {}}, {"num_labels": "3", "label2id": []},
    {"label2id": {"a": 0, "b": 0}}, {"label2id": {"a": 10**30}}, {"label2id": {"a": "0"}}, {"label2id": {"a": True}},
    {"label2id": {"a": 0.5}}, {"label2id": {"\ud800": 0}}, {"label2id": {str(i): i for i in range(50_000)}},
    {"label2id": {"a\nb": 0}}, {"num_labels": 0, "label2id": None}, {"label2id": ["a", "b"]}, {"model_class": ["x"]},
    {"model_class": "\ud800"}, {"model_class": "../x"}, {"config": {"head_type": "classification"}}, {"config": 1},
    {"config": {"head_type": "classification", "num_labels": 10**12, "layers": 10**12}}, {"config": nest(900)},
    {"config": {"head_type": ["x"], "layers": "2", "activation_function": {}}}, {"name": "../x"}, {"name": 1},
)  # fmt: skip
SHARDS: tuple[Any, ...] = (
    "..", ".", "", "/etc/passwd", "/dev/zero", "../delta/adapter.safetensors", "../base/config.json", "a/b", "a\\b",
    "..\\x",
    "C:x", "\0", "a\0b", "\ud800", "a\nb", "x" * 300, "x" * 100_000, "config.json", "tokenizer.json",
    "missing.safetensors",
    "model.safetensors.index.json", None, 1, True, 1.5, [], {}, ["model-00001-of-00003.safetensors"],
    "model.safetensors ",
    "MODEL-00001-OF-00003.SAFETENSORS", ".hidden", "~", "$HOME", "%2e%2e", "é.safetensors", "-rf",
)  # fmt: skip
INDEX = ".index.json"


def _to_shard(content: Any, random: Random, value: Any, every: bool) -> None:
    names = list(content["weight_map"])
    for name in names if every else [random.choice(names)]:
        content["weight_map"][name] = value


def _others() -> None:
    for value in MEMBERS:
        change_json("adapter config", label(value), _set("config", value), "adapter_config.json")
    for value in LABELS:
        change_json(
            "labels", label(value), lambda content, random, value=value: content.update(value), "head_config.json"
        )
        change_json(
            "labels", label(value), lambda content, random, value=value: content.update(value), "delta/config.json"
        )
    for value in SHARDS:
        for every in (False, True):
            change_json("index", f"{'all' if every else 'one'} in {label(value)}", lambda content, random, value=value,
                        every=every: _to_shard(content, random, value, every), INDEX)  # fmt: skip
    change_json("index", "all in one shard", lambda content, random: _to_shard(
        content, random, random.choice(list(content["weight_map"].values())), True), INDEX)  # fmt: skip
    change_json("index", "a tensor less", lambda content, random:
                content["weight_map"].pop(random.choice(list(content["weight_map"]))) and None, INDEX)  # fmt: skip
    for name in ("", "x", "\ud800", "a\nb", "__metadata__"):
        change_json("index", f"a tensor more {label(name)}", lambda content, random, name=name:
                    content["weight_map"].update({name: random.choice(list(content["weight_map"].values()))}),
                    INDEX)  # fmt: skip
    change_json("index", "300,000 tensors more", lambda content, random: content["weight_map"].update(
        {str(i): next(iter(content["weight_map"].values())) for i in range(300_000)}), INDEX)  # fmt: skip
    for value in VALUES:
        change_json("index", f"total_size = {label(value)}", lambda content, random, value=value:
                    content["metadata"].update(total_size=value), INDEX)  # fmt: skip


_fields()
_others()
