"""The expected output of a merge, computed with the safetensors library and torch, not the package under test."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.pairs import D, T

EMBEDDINGS = ("word_embeddings.weight", "embed_tokens.weight", "shared.weight", "wte.weight", "tok_embeddings.weight",
              "word_embedding.weight")  # fmt: skip
BIASES = ("predictions.bias", "decoder.bias", "lm_head.bias", "vocab_projector.bias", "final_logits_bias")
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Escape(Exception):
    """A case escaped: the message says what must not happen."""


@dataclass(frozen=True)
class Inputs:
    """Base and delta as other libraries read them; `methods`: the members of an adapter's configuration."""

    base: dict[str, T]
    delta: dict[str, T]
    head: dict[str, T]
    flexible_head: dict[str, T]
    methods: list[Any]
    is_adapter: bool
    config: dict[str, Any]
    pickled_base: bool


def read_inputs(root: Path) -> Inputs:
    base, delta = root / "base", root / "delta"
    is_adapter = (delta / "adapter_config.json").is_file()
    weights = read_first(delta, "adapter.safetensors", "pytorch_adapter.bin") if is_adapter else read_checkpoint(delta)
    has_head = is_adapter and any((delta / n).is_file() for n in ("model_head.safetensors", "pytorch_model_head.bin"))
    is_static = has_head and json.loads((delta / "head_config.json").read_bytes()).get("config") is None
    head = read_first(delta, "model_head.safetensors", "pytorch_model_head.bin") if has_head else {}
    config = json.loads((base / "config.json").read_bytes()) if (base / "config.json").exists() else {}
    return Inputs(
        base=read_checkpoint(base),
        delta=weights,
        head=head if is_static else {},
        flexible_head={} if is_static else head,
        methods=_methods(json.loads((delta / "adapter_config.json").read_bytes())) if is_adapter else [],
        is_adapter=is_adapter,
        config=config,
        pickled_base=not list(base.glob("*.safetensors")),
    )


def _methods(config: dict[str, Any]) -> list[Any]:
    method = config.get("config")
    members = method.get("configs", [method]) if isinstance(method, dict) else [method]
    return members if isinstance(members, list) else []


def read_first(folder: Path, *names: str) -> dict[str, T]:
    return read(next(folder / name for name in names if (folder / name).is_file()))


def read_checkpoint(folder: Path) -> dict[str, T]:
    """Read a checkpoint as Transformers does: one safetensors file, its shards, one pickle, or its shards."""
    for single, index in (("model.safetensors", "model.safetensors.index.json"),
                          ("pytorch_model.bin", "pytorch_model.bin.index.json")):  # fmt: skip
        if (folder / single).is_file():
            return read(folder / single)
        if (folder / index).is_file():
            shards = set(json.loads((folder / index).read_bytes())["weight_map"].values())
            return {name: tensor for shard in sorted(shards) for name, tensor in read(folder / shard).items()}
    raise Escape(f"{folder.name} holds no checkpoint")


def read(path: Path) -> dict[str, T]:
    """Read all tensors of a file with the library of its format."""
    import safetensors

    if path.suffix == ".bin":
        return _read_pickle(path)
    try:
        found = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise Escape(f"merged, but the safetensors library refuses {path.name}: {error}") from None
    return {name: T(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def _read_pickle(path: Path) -> dict[str, T]:
    import torch

    dtypes = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32",
              "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip
    found = torch.load(path, map_location="cpu", weights_only=True)
    made = {}
    for name, tensor in found.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        dtype = str(tensor.dtype).removeprefix("torch.")
        made[name] = T(dtypes.get(dtype, dtype.upper()), tuple(tensor.shape), raw)
    return made


def expected_output(inputs: Inputs) -> dict[str, T]:
    """Return `{name in the output: tensor}`, without folding."""
    if _stem(inputs) + "token_ids" not in inputs.delta:
        return _with_ordinary(dict(inputs.base), inputs, next(iter(inputs.base), ""), "bert")
    ids, rows, print_ = _parts(inputs)
    if print_:
        prefix, embedding = print_["prefix"], _locate(inputs.base, print_["embedding"], print_["prefix"])
    else:
        prefix, embedding = _guess_names(inputs)
    if print_:
        prefix = embedding.removesuffix(print_["embedding"]).removesuffix(".") or prefix
    merged = dict(inputs.base)
    matrix = merged[embedding]
    size = max(matrix.shape[0], (ids[-1] + 1) if ids else 0)
    for name in [embedding, *_copies(inputs, embedding)]:
        merged[name] = _splice(matrix, ids, rows, size)
    for name, tensor in inputs.base.items():
        if name.endswith(BIASES) and tensor.shape in ((matrix.shape[0],), (1, matrix.shape[0])):
            zeros = bytes((size - matrix.shape[0]) * len(tensor.data) // matrix.shape[0])
            merged[name] = T(tensor.dtype, (*tensor.shape[:-1], size), tensor.data + zeros)
    return _with_ordinary(merged, inputs, embedding, prefix)


def _guess_names(inputs: Inputs) -> tuple[str, str]:
    """Return prefix and E without a fingerprint: by the name of the rows, and by E's usual name."""
    rows = _stem(inputs)
    if inputs.is_adapter:
        width = inputs.delta[rows + "weight"].shape[1]
        usual = (n for n, t in inputs.base.items() if n.endswith(EMBEDDINGS) and t.shape[1:] == (width,))
        return rows.split("pema.")[0].removesuffix("."), next(usual)
    wanted = rows + "weight"
    found = next(name for name in inputs.base if name.endswith(wanted) or wanted.endswith("." + name))
    return (max(found, wanted, key=len).removesuffix(min(found, wanted, key=len)).removesuffix(".")), found


def _stem(inputs: Inputs) -> str:
    """Return the prefix of the rows' names; without rows, one that no output has."""
    part = ".pema.adapters." if inputs.is_adapter else ""
    names = (name.removesuffix("token_ids") for name in inputs.delta if name.endswith(".token_ids"))
    return next((name for name in names if part in f".{name}" and name + "weight" in inputs.delta), "no rows.")


def _parts(inputs: Inputs) -> tuple[list[int], T, dict[str, Any]]:
    """Return token ids, rows and fingerprint."""
    import torch

    stem = _stem(inputs)
    ids = inputs.delta[stem + "token_ids"]
    dtype = torch.int32 if ids.dtype == "I32" else torch.int64
    found = torch.frombuffer(bytearray(ids.data), dtype=dtype).tolist() if ids.data else []
    stored = inputs.delta.get(stem + "fingerprint")
    return found, inputs.delta[stem + "weight"], json.loads(stored.data) if stored else {}


def _canonical(name: str, prefix: str) -> str:
    name = name.removeprefix(prefix + ".") if prefix else name
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _locate(base: dict[str, T], wanted: str, prefix: str) -> str:
    """Return the name of E in the base: with the prefix, without, or with another."""
    for name in (f"{prefix}.{wanted}", wanted):
        if name in base:
            return name
    return next(name for name in base if name.endswith("." + wanted))


def _copies(inputs: Inputs, embedding: str) -> list[str]:
    tied = inputs.config.get("tie_word_embeddings", True) is not False
    matrix = inputs.base[embedding]
    return [name for name, tensor in inputs.base.items()
            if name != embedding and tensor == matrix and (tied or name.endswith(EMBEDDINGS))]  # fmt: skip


def _splice(matrix: T, ids: list[int], rows: T, size: int) -> T:
    width = len(matrix.data) // matrix.shape[0] if matrix.shape[0] else D * WIDTHS[matrix.dtype]
    data = bytearray(matrix.data) + bytes((size - matrix.shape[0]) * width)
    made = cast(rows, matrix.dtype)
    for k, i in enumerate(ids):
        data[i * width : (i + 1) * width] = made.data[k * width : (k + 1) * width]
    return T(matrix.dtype, (size, *matrix.shape[1:]), bytes(data))


def _torch(tensor: T) -> Any:
    import torch

    dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.dtype]
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype) if tensor.data else torch.empty(0, dtype=dtype)


def float64(tensor: T) -> Any:
    return _torch(tensor).double()


def cast(tensor: T, dtype: str) -> T:
    import torch

    if tensor.dtype == dtype or not tensor.data:
        return T(dtype, tensor.shape, tensor.data)
    wanted = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    return T(dtype, tensor.shape, _torch(tensor).to(wanted).view(torch.uint8).numpy().tobytes())


def _with_ordinary(merged: dict[str, T], inputs: Inputs, embedding: str, prefix: str) -> dict[str, T]:
    """Add the backbone weights and the static head; prefix all names where a new head needs it."""
    inside = prefix + "."
    parts = tuple(_stem(inputs) + part for part in ("token_ids", "weight", "fingerprint"))
    if inputs.is_adapter:
        ordinary = {n: t for n, t in inputs.head.items() if not n.startswith("bert.")}
    else:
        ordinary = {n: t for n, t in inputs.delta.items() if n not in parts}
    own_base = not inputs.is_adapter and not any(name.startswith(inside) for name in parts)
    stored = {_canonical(name, prefix): name for name in sorted(merged, key=lambda name: name.startswith(inside))}
    new = {n: t for n, t in ordinary.items() if _canonical(n, prefix) not in stored}
    heads = {n for n in new if prefix and not own_base and not n.startswith(inside)}
    is_prefixed = embedding.startswith(inside)
    replaced = Counter(_canonical(name, prefix) for name in ordinary)
    if replaced and max(replaced.values()) > 1:
        raise Escape(f"two tensors of the delta are for {replaced.most_common(1)[0][0]!r}, and one was lost")
    for name, tensor in ordinary.items():
        if name not in new:
            old = stored[_canonical(name, prefix)]
            if old != embedding:
                merged[old] = cast(tensor, merged[old].dtype)
    if heads and not is_prefixed:
        merged = {inside + name: tensor for name, tensor in merged.items()}
        is_prefixed = True
    for name, tensor in new.items():
        bare = name.removeprefix(inside) if prefix else name
        merged[name if name in heads or not prefix else inside + bare if is_prefixed else bare] = tensor
    return merged


def folded_weight(inputs: Inputs, name: str) -> Any:
    """Return the weight `name` of the base with LoRA folded in, float64; None for other kinds of LoRA."""
    module = name.removeprefix("bert.").removesuffix(".weight")
    parts = {
        key.rpartition(".")[2]: tensor
        for key, tensor in inputs.delta.items()
        if key.removeprefix("bert.").startswith(f"{module}.loras.")
    }
    weight = inputs.base.get(name, inputs.base.get(name.removeprefix("bert.")))
    found = [method for method in inputs.methods if isinstance(method, dict) and method.get("architecture") == "lora"]
    if parts.keys() != {"lora_A", "lora_B"} or len(found) != 1 or weight is None:
        return None
    left, right = (float64(parts[key]).reshape(parts[key].shape) for key in ("lora_B", "lora_A"))
    return float64(weight).reshape(weight.shape) + left @ right * (found[0]["alpha"] / found[0]["r"])
