"""Inputs of the merge benches, an encoder of any size and a delta for it, and `pema-merge` as a process.

The encoder is XLM-RoBERTa's: one embedding matrix [V, 768] and `layers` layers, every tensor of it but the head.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.child import anonymous_bytes
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.formats.safetensors_header import encode_header, size_in_bytes

D, FEED_FORWARD, HEADS, POSITIONS = 768, 3072, 12, 514
E = "roberta.embeddings.word_embeddings.weight"
WEIGHTS, ROWS = "model.safetensors", "adapter.safetensors"
MERGE = [sys.executable, "-c", "import sys; from pema_adapters.cli.merge import main; sys.exit(main())"]
POLL_SECONDS = 0.002

_SQUARE, _UP, _DOWN = (D, D), (FEED_FORWARD, D), (D, FEED_FORWARD)
_PARTS = {
    "attention.self.query": _SQUARE, "attention.self.key": _SQUARE, "attention.self.value": _SQUARE,
    "attention.output.dense": _SQUARE, "intermediate.dense": _UP, "output.dense": _DOWN,
}  # fmt: skip
_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
FOLDED = tuple(part for part in _PARTS if part != "attention.output.dense")
"""Matrices with LoRA: q, k, v and both feed-forward matrices. `adapters` has no LoRA on the attention's output."""
LORA = {
    "architecture": "lora", "selfattn_lora": True, "intermediate_lora": True, "output_lora": True, "leave_out": [],
    "r": 8, "alpha": 16, "dropout": 0.0, "attn_matrices": ["q", "k", "v"], "composition_mode": "add",
    "init_weights": "lora", "init_weights_seed": None, "use_gating": False, "use_dora": False, "vera_d": None,
    "vera_b": None, "dtype": None,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """V rows of embeddings, `layers` layers."""

    rows: int
    layers: int

    @classmethod
    def of(cls, size: float) -> "Shape":
        """Return a shape of about `size` bytes, half of them in the layers and half in the embedding matrix."""
        layer = sum(size_in_bytes("F32", shape) for name, shape in cls(0, 1).tensors().items() if ".layer." in name)
        layers = max(1, round(size / 2 / layer))
        return cls(int(size - layers * layer) // (4 * D), layers)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return `{name: shape}` in the order of the file."""
        found = {E: (self.rows, D), "roberta.embeddings.position_embeddings.weight": (POSITIONS, D)}
        found["roberta.embeddings.token_type_embeddings.weight"] = (1, D)
        norms = ["roberta.embeddings.LayerNorm"]
        for layer in range(self.layers):
            for part, shape in _PARTS.items():
                found[f"{_layer_name(layer)}.{part}.weight"] = shape
                found[f"{_layer_name(layer)}.{part}.bias"] = shape[:1]
            norms += [f"{_layer_name(layer)}.{norm}" for norm in _NORMS]
        return found | {f"{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}

    def config(self) -> dict[str, Any]:
        """Return the config.json of it."""
        return {
            "model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "vocab_size": self.rows,
            "hidden_size": D, "num_hidden_layers": self.layers, "num_attention_heads": HEADS,
            "intermediate_size": FEED_FORWARD, "max_position_embeddings": POSITIONS, "type_vocab_size": 1,
        }  # fmt: skip


def write_base(folder: Path, shape: Shape, *, sparse: bool = False) -> None:
    """Write a checkpoint of noise; with `sparse`, of zeros that take no space on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config()))
    tensors = [(name, "F32", dims) for name, dims in shape.tensors().items()]
    left = sum(size_in_bytes(dtype, dims) for _, dtype, dims in tensors)
    noise = (np.random.default_rng(0).standard_normal(4 << 20, dtype=np.float32) * 0.02).tobytes()
    with (folder / WEIGHTS).open("wb") as file:
        begin = file.write(encode_header(tensors, {"format": "pt"}))
        if sparse:
            file.truncate(begin + left)
            return
        while left:
            left -= file.write(noise[: min(left, len(noise))])


def write_delta(folder: Path, base: Path, shape: Shape, count: int, *, lora: bool = False) -> None:
    """Write an adapter "task" with `count` rows for this base alone, with `lora` LoRA beside them."""
    folder.mkdir()
    ids = np.sort(np.random.default_rng(1).choice(shape.rows, count, replace=False)).astype(np.int32)
    rows = np.random.default_rng(2).standard_normal((count, D), dtype=np.float32)
    tensors = {"fingerprint": _fingerprint(base, ids), "token_ids": ids, "weight": rows}
    tensors = {f"roberta.pema.adapters.task.{name}": values for name, values in tensors.items()}
    method: dict[str, Any] = {"architecture": "pema", "unseen": "base"}
    if lora:
        tensors |= lora_tensors(shape)
        method = {"architecture": "union", "configs": [method, LORA]}
    config = {"config": method, "name": "task", "model_type": "xlm-roberta"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_tensors(folder / ROWS, tensors)


def _fingerprint(base: Path, ids: np.ndarray) -> np.ndarray:
    checkpoint = Checkpoint.open(base)
    names = [name for name in checkpoint.tensors if name != E]
    size = checkpoint.tensors[E].shape[0]
    taken = Fingerprint.compute(checkpoint, embedding=E, prefix="roberta", vocab_size=size, token_ids=ids, names=names)
    return taken.to_array()


def lora_tensors(shape: Shape) -> dict[str, np.ndarray]:
    """Return LoRA of every matrix in `FOLDED`, as `adapters` names it: A [r, in], B [out, r]."""
    random, found = np.random.default_rng(3), {}
    for layer in range(shape.layers):
        for part in FOLDED:
            out, width = _PARTS[part]
            module = f"{_layer_name(layer)}.{part}.loras.task"
            found[f"{module}.lora_A"] = random.standard_normal((LORA["r"], width), dtype=np.float32) * 0.02
            found[f"{module}.lora_B"] = random.standard_normal((out, LORA["r"]), dtype=np.float32) * 0.02
    return found


def _layer_name(layer: int) -> str:
    return f"roberta.encoder.layer.{layer}"


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file without its library, straight from the arrays."""
    dtypes = {"float32": "F32", "int32": "I32", "uint8": "U8"}
    header = [(name, dtypes[str(values.dtype)], values.shape) for name, values in tensors.items()]
    with path.open("wb") as file:
        file.write(encode_header(header, {"format": "pt"}))
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).data)


@dataclass(frozen=True)
class Run:
    """A process: its peak of anonymous memory in bytes, and what it printed."""

    peak: int
    output: str


def run(command: Sequence[str | Path]) -> Run:
    """Run a command and poll its memory. Raises RuntimeError with the end of stderr where it fails."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        stdout, stderr = [(file.seek(0), file.read())[1] for file in (output, errors)]
    if process.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{stderr[-2000:]}")
    return Run(peak, stdout)


def merge(base: Path, *more: str | Path) -> Run:
    """Run `pema-merge --base BASE ... --quiet` in a fresh process, its start included."""
    return run([*MERGE, "--base", base, *more, "--quiet"])


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
