"""Small bases and deltas, written by hand byte for byte, and an oracle that merges them in memory."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors
import torch

from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.formats.tensor_names import canonicalize

V, D = 20, 4
IDS = [2, 3, 4, 9, 17, 19]
E = "embeddings.word_embeddings.weight"
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
         "I32": torch.int32, "U8": torch.uint8}  # fmt: skip


class T(NamedTuple):
    """A stored tensor: dtype, shape, bytes."""

    dtype: str
    shape: tuple
    data: bytes

    @classmethod
    def of(cls, values, dtype="F32"):
        tensor = torch.as_tensor(np.asarray(values)).to(TORCH[dtype]).contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return cls(dtype, tuple(tensor.shape), raw)

    @property
    def values(self):
        dtype = TORCH[self.dtype]
        return (
            torch.frombuffer(bytearray(self.data), dtype=dtype).reshape(self.shape)
            if self.data
            else torch.empty(self.shape, dtype=dtype)
        )

    def to(self, dtype):
        return T.of(self.values.double().numpy(), dtype) if dtype != self.dtype else self


def noise(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def write(path, tensors, metadata=None):
    """A safetensors file with the tensors in the order given; the writer of the library would sort them."""
    entries, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(tensor.data)],
        }
        end += len(tensor.data)
    header = json.dumps(entries).encode()
    data = b"".join(tensor.data for tensor in tensors.values())
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + data)


def read(folder):
    """All tensors of an output, by the safetensors library."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            found[name] = T(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def in_order(folder):
    """The names of all tensors, file by file, in the order of their bytes."""
    found = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__", None)
        found += sorted(header, key=lambda name: header[name]["data_offsets"])
    return found


def backbone(dtype="F32"):
    """Not sorted by name or size, with an integer buffer in between."""
    return {
        "encoder.layer.0.output.dense.weight": T.of(noise(D, D), dtype),
        "embeddings.position_ids": T.of(np.arange(7), "I64"),
        E: T.of(noise(V, D), dtype),
        "encoder.layer.0.output.LayerNorm.weight": T.of(noise(D, seed=1), dtype),
        "pooler.dense.bias": T.of(noise(D, seed=2), dtype),
    }


@dataclass
class Base:
    folder: Path
    tensors: dict
    shards: dict = field(default_factory=dict)
    prefix: str = "bert"

    @property
    def embedding(self):
        return next(name for name in self.tensors if name.endswith(E))

    @property
    def source(self):
        return Checkpoint.open(self.folder)


CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": V, "hidden_size": D, "dtype": "float32"}


@pytest.fixture
def make_base(tmp_path):
    def make(*, dtype="F32", prefixed=True, shards=1, extra=None, legacy=False, config=None, name="base", pickled=False, tied=None):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        tensors = {("bert." + key if prefixed else key): tensor for key, tensor in backbone(dtype).items()}
        if legacy:
            tensors = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): t for key, t in tensors.items()}
        tensors |= extra or {}
        write_all = _pickle_shards if pickled else _write_shards
        base = Base(folder, tensors, write_all(folder, tensors, shards, **({"tied": tied or {}} if pickled else {})))
        (folder / "config.json").write_text(json.dumps(CONFIG | (config or {}), indent=1))
        (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
        return base

    return make


def _write_shards(folder, tensors, count):
    if count == 1:
        write(folder / "model.safetensors", tensors, {"format": "pt", "note": "kept"})
        return {}
    files = {name: f"model-{1 + i % count:05}-of-{count:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(files.values())):
        write(folder / file, {name: t for name, t in tensors.items() if files[name] == file}, {"format": "pt"})
    size = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def _pickle_shards(folder, tensors, count, tied):
    """As torch.save writes them; `tied`: further names of one tensor, which Transformers ties again."""
    values = {name: tensor.values.clone() for name, tensor in tensors.items()}
    values |= {name: values[other] for name, other in tied.items()}
    if count == 1:
        torch.save(values, folder / "pytorch_model.bin")
        return {}
    files = {name: f"pytorch_model-{1 + i % count:05}-of-{count:05}.bin" for i, name in enumerate(tensors)}
    files |= {name: files[other] for name, other in tied.items()}
    for file in sorted(set(files.values())):
        torch.save({name: v for name, v in values.items() if files[name] == file}, folder / file)
    size = sum(len(tensor.data) for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def fingerprint_of(base, ids, vocab_size=None, names=None):
    source = base.source
    names = [name for name in source.tensors if "embeddings.word" not in name and "decoder" not in name and
             (not base.embedding.startswith("bert.") or name.startswith("bert."))] if names is None else names  # fmt: skip
    taken = Fingerprint.compute(source, embedding=base.embedding, prefix=base.prefix, vocab_size=vocab_size or V,
                             token_ids=np.asarray(ids), names=names)  # fmt: skip
    return T("U8", (len(taken.to_array()),), taken.to_array().tobytes())


@dataclass
class Delta:
    folder: Path
    ids: list
    rows: T
    ordinary: dict = field(default_factory=dict)


@pytest.fixture
def make_adapter(tmp_path):
    """An adapter artifact; `head`: tensors of a static head, `flexible`: of a flexible one, `rest`: of another method."""

    def make(base, *, ids=IDS, dtype="F32", prefix="bert", head=None, flexible=None, rest=None, name="task",
             folder="run", vocab_size=None, replace=None, drop=(), head_config=None):  # fmt: skip
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        rows = T.of(noise(len(ids), D, seed=5), dtype)
        inside = f"{prefix}." if prefix else ""
        tensors = {
            "fingerprint": fingerprint_of(base, ids, vocab_size),
            "token_ids": T.of(ids, "I32"),
            "weight": rows,
        }
        tensors = {**tensors, **(replace or {})}
        tensors = {f"{inside}pema.adapters.{name}.{part}": t for part, t in tensors.items() if part not in drop}
        write(folder / "adapter.safetensors", tensors | (rest or {}))
        method = {"architecture": "pema", "unseen": "base"}
        if rest:
            method = {"architecture": "union", "configs": [method, {"architecture": None, "reduction_factor": 16}]}
        config = {"config": method, "name": name, "model_class": "BertForSequenceClassification", "model_type": "bert"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if head or flexible:
            write(folder / "model_head.safetensors", head or flexible)
            classes = {"label2id": {"no": 0, "yes": 1, "maybe": 2}, "num_labels": 3}
            made = {"config": None, "name": None, "model_class": "BertForSequenceClassification", **classes}
            if flexible:
                made |= {"config": {"head_type": "classification"}, "name": name, "model_class": "BertAdapterModel"}
            (folder / "head_config.json").write_text(json.dumps(made | (head_config or {})))
        return Delta(folder, list(ids), rows, head or {})

    return make


@pytest.fixture
def make_full(tmp_path):
    """A full-fine-tuning delta: every backbone weight and a head."""

    def make(base, *, ids=IDS, dtype="F32", own_base=False, folder="run", replace=None, drop=(), config=None):
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        inside = "" if own_base else "bert."
        rows = T.of(noise(len(ids), D, seed=5), dtype)
        trained = {
            inside + n: T.of(noise(*t.shape, seed=7), dtype)
            for n, t in backbone().items()
            if t.dtype == "F32" and n != E
        }
        if not own_base:
            trained["classifier.weight"] = T.of(noise(2, D, seed=8), dtype)
        trained = {**trained, **(replace or {})}
        own = {".weight": rows, ".token_ids": T.of(ids, "I32"), ".fingerprint": fingerprint_of(base, ids)}
        name = inside + E.removesuffix(".weight")
        own = {name + part: tensor for part, tensor in own.items() if part not in drop}
        write(folder / "model.safetensors", trained | own, {"format": "pt"})
        trained_config = CONFIG | {"architectures": ["BertForSequenceClassification"]} | (config or {})
        (folder / "config.json").write_text(json.dumps(trained_config))
        return Delta(folder, list(ids), rows, trained)

    return make


def oracle(base, delta):
    """What the output must hold, in memory: `{name: T}`."""
    prefixed = base.embedding.startswith("bert.")
    heads = {n for n in delta.ordinary if not n.startswith("bert.") and "classifier" in n}
    add = "bert." if heads and not prefixed else ""
    merged = {add + name: tensor for name, tensor in base.tensors.items()}
    names = {canonicalize(name, "bert"): name for name in merged}
    matrix = base.tensors[base.embedding]
    copies = [name for name, tensor in base.tensors.items() if tensor == matrix]
    size = D * len(matrix.data) // (V * D)
    data, rows = bytearray(matrix.data), delta.rows.to(matrix.dtype).data
    for k, i in enumerate(delta.ids):
        data[i * size : (i + 1) * size] = rows[k * size : (k + 1) * size]
    for name in copies:
        merged[add + name] = T(matrix.dtype, matrix.shape, bytes(data))
    for name, tensor in delta.ordinary.items():
        key = canonicalize(name, "bert")
        if key in names:
            merged[names[key]] = tensor.to(merged[names[key]].dtype)
        elif name in heads:
            merged[name] = tensor
        else:
            merged[("bert." if prefixed or add else "") + key] = tensor
    return merged
