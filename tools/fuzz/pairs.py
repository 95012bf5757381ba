"""Small valid bases and deltas for the fuzzer: `{path below the case: content}`, written by hand, byte for byte.

Each pair is one way in which a base and a delta may lie on disk. All are of one BERT with V = 40, d = 4.
"""

import io
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

V, D, PREFIX, NAME = 40, 4, "bert", "task"
E = "embeddings.word_embeddings.weight"
IDS = (2, 3, 4, 9, 17, 19, 20, 38, 39)
INDEX, PICKLE_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
LAYER = "encoder.layer.0.attention.self.query"


@dataclass(frozen=True)
class Link:
    """A symbolic link to `target` in place of a file; `{case}` in it is the folder of the case."""

    target: str


class Folder:
    """An empty folder in place of a file."""


class Pipe:
    """A named pipe in place of a file, that nobody writes to."""


Node: TypeAlias = bytes | Link | Folder | Pipe
Files: TypeAlias = dict[str, Node]


def put(root: Path, files: Files) -> None:
    """Write all files below `root`."""
    for name, node in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(node, bytes):
            path.write_bytes(node)
        elif isinstance(node, Link):
            path.symlink_to(node.target.format(case=root))
        elif isinstance(node, Folder):
            path.mkdir()
        else:
            os.mkfifo(path)


@dataclass(frozen=True)
class T:
    """A stored tensor: dtype, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def of(values: Any, dtype: str = "F32") -> T:
    """Make a tensor, as in `of([1, 2], "I32")`; BF16 is truncated, not rounded."""
    array = np.asarray(values)
    if dtype == "BF16":
        return T(dtype, array.shape, (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())
    numpy = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}[dtype]
    return T(dtype, array.shape, array.astype(numpy).tobytes())


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def safetensors(tensors: dict[str, T], metadata: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file with the tensors in the order given."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor.data)
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(tensor.data for tensor in tensors.values())


def pickle(tensors: dict[str, T]) -> bytes:
    """Return a pickle of `torch.save`; equal E and decoder share a storage, as in a model."""
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
    made: dict[T, Any] = {}
    for tensor in tensors.values():
        if tensor not in made:
            made[tensor] = torch.frombuffer(bytearray(tensor.data), dtype=dtypes[tensor.dtype]).reshape(tensor.shape)
    file = io.BytesIO()
    torch.save({name: made[tensor] for name, tensor in tensors.items()}, file)
    return file.getvalue()


def dump(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def backbone(dtype: str = "F32", prefix: str = "bert.") -> dict[str, T]:
    found = {
        f"{LAYER}.weight": of(noise(D, D), dtype),
        f"{LAYER}.bias": of(noise(D), dtype),
        "embeddings.position_ids": of(np.arange(7), "I64"),
        E: of(noise(V, D), dtype),
        "encoder.layer.0.output.LayerNorm.gamma": of(noise(D, seed=1), dtype),
        "pooler.dense.bias": of(noise(D, seed=2), dtype),
    }
    return {prefix + name: tensor for name, tensor in found.items()}


def language_model() -> dict[str, T]:
    """Add a tied decoder, stored once more, and its bias."""
    bias = of(noise(V, seed=3))
    return backbone() | {"cls.predictions.bias": bias, "cls.predictions.decoder.weight": of(noise(V, D))}


CONFIG = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": V, "hidden_size": D, "dtype": "float32",
    "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
MODULES: Files = {
    "base/modules.json": dump([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]),
    "base/1_Pooling/config.json": b'{"dim": 4}',
    "delta/adapter_interface.json": b'{"adapter_types": []}',
}  # fmt: skip
LABELS = {"label2id": {"no": 0, "yes": 1, "maybe": 2}, "num_labels": 3}


def base(tensors: dict[str, T], *, shards: int = 1, pickled: bool = False) -> Files:
    suffix, index = ("bin", PICKLE_INDEX) if pickled else ("safetensors", INDEX)
    stem = "pytorch_model" if pickled else "model"
    files: Files = {"base/config.json": dump(CONFIG), "base/tokenizer.json": b'{"a": "tokenizer"}'}
    if shards == 1:
        return files | {f"base/{stem}.{suffix}": pickle(tensors) if pickled else safetensors(tensors, {"format": "pt"})}
    where = {name: f"{stem}-{1 + i % shards:05}-of-{shards:05}.{suffix}" for i, name in enumerate(tensors)}
    for file in sorted(set(where.values())):
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        files[f"base/{file}"] = pickle(part) if pickled else safetensors(part, {"format": "pt"})
    size = sum(len(tensor.data) for tensor in tensors.values())
    files[f"base/{index}"] = dump({"metadata": {"total_size": size}, "weight_map": where})
    return files


def rows(tensors: dict[str, T], vocab_size: int = V) -> dict[str, T]:
    """Return fingerprint, token ids and rows of a delta of the base with these tensors."""
    ids = (*IDS, *range(V, vocab_size))
    return {
        "fingerprint": fingerprint(tensors, ids, vocab_size),
        "token_ids": of(ids, "I32"),
        "weight": of(noise(len(ids), D, seed=5)),
    }


def fingerprint(tensors: dict[str, T], ids: tuple[int, ...], vocab_size: int) -> T:
    from pema_adapters.formats.checkpoint import Checkpoint
    from pema_adapters.formats.fingerprint import Fingerprint

    with tempfile.TemporaryDirectory() as name:
        put(Path(name), base(tensors))
        source = Checkpoint.open(Path(name, "base"))
        embedding = next(n for n in source.tensors if n.endswith(E))
        names = [n for n in source.tensors if n != embedding and not n.startswith("cls.")]
        taken = Fingerprint.compute(source, embedding=embedding, prefix=PREFIX, vocab_size=vocab_size,
                                 token_ids=np.asarray(ids), names=names)  # fmt: skip
        data = taken.to_array().tobytes()
    return T("U8", (len(data),), data)


def adapter(own: dict[str, T], *, rest: dict[str, T] | None = None, lora: bool = False, head: str = "",
            pickled: bool = False) -> Files:  # fmt: skip
    """Return the files of `save_adapter`: rows, other methods (`rest`), a head ("static" or "flexible")."""
    write, suffix = (pickle, "bin") if pickled else (safetensors, "safetensors")
    stem = "pytorch_" if pickled else ""
    method: dict[str, Any] = {"architecture": "pema", "unseen": "base"}
    if rest:
        other = LORA if lora else {"architecture": None, "phm_dim": 2, "mh_adapter": True, "output_adapter": True}
        method = {"architecture": "union", "configs": [method, other]} if own else other
    config = {"config": method, "name": NAME, "model_class": "BertForSequenceClassification", "model_type": "bert"}
    named = {f"{PREFIX}.pema.adapters.{NAME}.{part}": tensor for part, tensor in own.items()} | (rest or {})
    files: Files = {"delta/adapter_config.json": dump(config), f"delta/{stem}adapter.{suffix}": write(named)}
    if head:
        config, tensors = STATIC if head == "static" else FLEXIBLE
        files["delta/head_config.json"] = dump(config | LABELS)
        files[f"delta/{stem}model_head.{suffix}"] = write(tensors)
    return files


STATIC = (
    {"config": None, "name": None, "model_class": "BertForSequenceClassification"},
    {"classifier.weight": of(noise(3, D, seed=8)), "classifier.bias": of(noise(3, seed=8))},
)
FLEXIBLE = (
    {"config": {"head_type": "tagging", "num_labels": 3, "layers": 1, "activation_function": "tanh",
                "label2id": LABELS["label2id"]}, "name": NAME, "model_class": "BertAdapterModel"},
    {f"heads.{NAME}.1.weight": of(noise(3, D, seed=8)), f"heads.{NAME}.1.bias": of(noise(3, seed=8))},
)  # fmt: skip


LORA = {"architecture": "lora", "r": 2, "alpha": 4, "attn_matrices": ["q"], "composition_mode": "add",
        "selfattn_lora": True, "use_gating": False, "dropout": 0.0, "init_weights": "lora"}  # fmt: skip
LORA_TENSORS = {
    f"{PREFIX}.{LAYER}.loras.{NAME}.lora_A": of(noise(2, D, seed=9)),
    f"{PREFIX}.{LAYER}.loras.{NAME}.lora_B": of(noise(D, 2, seed=9)),
}
COMPACTER = {
    f"{PREFIX}.encoder.layer.0.output.adapters.{NAME}.adapter_down.0.W_left": of(noise(2, 2, 1, seed=9)),
    f"{PREFIX}.shared_parameters.{NAME}.phm_rule": of(noise(2, 2, 2, seed=9)),
}


def full(own: dict[str, T], *, shards: int = 1, pickled: bool = False) -> Files:
    """Return the files of `save_delta`: every trained weight, the embedding as K rows, and a head."""
    trained = {n: of(noise(*t.shape, seed=7)) for n, t in backbone().items() if t.dtype == "F32" and not n.endswith(E)}
    trained |= {"classifier.weight": of(noise(2, D, seed=8))}
    trained |= {f"{PREFIX}.{E.removesuffix('.weight')}.{part}": tensor for part, tensor in own.items()}
    made = {
        name.replace("base/", "delta/"): node for name, node in base(trained, shards=shards, pickled=pickled).items()
    }
    del made["delta/tokenizer.json"]
    config = {**CONFIG, "architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"},
              "label2id": {"no": 0, "yes": 1}}  # fmt: skip
    return made | {"delta/config.json": dump(config)}


def pairs() -> dict[str, Files]:
    """Return `{name: files}` of every pair."""
    plain, half, lm = backbone(), backbone("BF16", prefix=""), language_model()
    bare = {part: tensor for part, tensor in rows(plain).items() if part != "fingerprint"}
    single, shards = base(plain), base(plain, shards=3)
    return {
        "adapter": single | adapter(rows(plain)),
        "adapter, LoRA, head, shards": shards | adapter(rows(plain), rest=LORA_TENSORS, lora=True, head="static"),
        "adapter, Compacter, bf16": base(half) | MODULES | adapter(rows(half), rest=COMPACTER, head="static"),
        "LoRA alone, flexible head": single | adapter({}, rest=LORA_TENSORS, lora=True, head="flexible"),
        "LoRA, bf16": base(half) | adapter(rows(half), rest=LORA_TENSORS, lora=True, head="flexible"),
        "adapter.bin": single | adapter(rows(plain), pickled=True, head="static"),
        "grown, tied": base(lm, shards=2) | adapter(rows(lm, V + 3)),
        "no fingerprint": single | adapter(bare),
        "full, no fingerprint": single | full(bare),
        "full, bf16": base(half) | full(rows(half)),
        "full, shards": shards | full(rows(plain), shards=2),
        "full.bin": single | full(rows(plain), pickled=True),
        "base.bin": base(lm, pickled=True) | adapter(rows(lm)),
        "base.bin, shards": base(plain, shards=2, pickled=True) | full(rows(plain)),
    }
