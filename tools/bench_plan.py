"""Time of a merge before its first byte: headers, fingerprint and plan of checkpoints of many small tensors.

    python tools/bench_plan.py [--rounds 5] [--json FILE] [--save]

Checkpoints of 1,000 tensors in 50 shards and of 10,000 in 500, one adapter with 25 rows. CPU seconds of this process,
the best of the rounds, and microseconds a tensor: constant where the work is linear in the number of tensors.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from harness.command_line import make_parser
from harness.results import write_results
from harness.tables import format_table
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.delta import read_delta
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.merging.planning.planner import plan_merge

V, D, K = 200, 8, 25
SIZES = ((1_000, 50), (10_000, 500))
EMBEDDING = "model.embed_tokens.weight"


def make_base(folder: Path, count: int, shards: int) -> Path:
    """Write a checkpoint of `count` tensors, as a mixture of experts names them."""
    folder.mkdir()
    weight = np.ones((4, 4), np.float32)
    names = [f"model.layers.{i // 10}.mlp.experts.{i % 10}.weight" for i in range(count - 1)]
    tensors = {EMBEDDING: np.zeros((V, D), np.float32), **dict.fromkeys(names, weight)}
    files = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": V, "hidden_size": D}))
    return folder


def make_delta(folder: Path, base: Path) -> Path:
    """Write an adapter with PEMA alone, with a fingerprint of all tensors of the base."""
    folder.mkdir()
    source, ids = Checkpoint.open(base), np.arange(0, 2 * K, 2, dtype=np.int32)
    names = [name for name in source.tensors if name != EMBEDDING]
    fingerprint = Fingerprint.compute(
        source, embedding=EMBEDDING, prefix="model", vocab_size=V, token_ids=ids, names=names
    )
    parts = {"token_ids": ids, "weight": np.ones((K, D), np.float32), "fingerprint": fingerprint.to_array()}
    tensors = {f"model.pema.adapters.task.{name}": value for name, value in parts.items()}
    save_file(tensors, folder / "adapter.safetensors")
    config = {"config": {"architecture": "pema"}, "name": "task", "model_type": "llama", "hidden_size": D}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def time_plan(base: Path, delta: Path) -> float:
    """Return the CPU seconds from opening the files to a plan."""
    start = time.process_time()
    plan_merge(Checkpoint.open(base), read_delta(delta))
    return time.process_time() - start


def measure(rounds: int) -> dict[str, Any]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        for count, shards in SIZES:
            base = make_base(Path(name, f"base-{count}"), count, shards)
            delta = make_delta(Path(name, f"delta-{count}"), base)
            seconds = [time_plan(base, delta) for _ in range(rounds)]
            found.append({"tensors": count, "shards": shards, "seconds": seconds})
    return {"sizes": found}


def render(figures: dict[str, Any]) -> str:
    rows = []
    for size in figures["sizes"]:
        best, worst = min(size["seconds"]), max(size["seconds"])
        rows.append([f"{size['tensors']:,}", size["shards"], f"{best:.2f} to {worst:.2f}",
                     f"{best / size['tensors'] * 1e6:.0f}"])  # fmt: skip
    return format_table(["tensors", "shards", "CPU s", "best, us a tensor"], rows)


def main() -> None:
    options = make_parser(__doc__, rounds=5).parse_args()
    figures = measure(options.rounds)
    print(render(figures))
    write_results(options, figures)


if __name__ == "__main__":
    main()
