"""How long a merge takes before its first byte: headers, fingerprint and plan of checkpoints of many small tensors.

    python tools/bench_plan.py [--rounds 5] [--json FILE]

Checkpoints of 1,000 tensors in 50 shards and of 10,000 in 500, one adapter with 25 rows. CPU seconds of this process,
the best of the rounds, and microseconds a tensor: constant where the work is linear in the number of tensors.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench import table, write_json
from safetensors.numpy import save_file

from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.delta import read_delta
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.merging.planning.planner import plan_merge

V, D, K = 200, 8, 25
SIZES = ((1_000, 50), (10_000, 500))
EMBEDDING = "model.embed_tokens.weight"


def make_base(folder: Path, count: int, shards: int) -> Path:
    """A checkpoint of `count` tensors, as a mixture of experts names them."""
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
    """An adapter with PEMA alone, with a fingerprint of all of the base's tensors."""
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


def plan_seconds(base: Path, delta: Path) -> float:
    """CPU seconds from nothing to a plan."""
    start = time.process_time()
    plan_merge(Checkpoint.open(base), read_delta(delta))
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for count, shards in SIZES:
            base = make_base(Path(name, f"base-{count}"), count, shards)
            delta = make_delta(Path(name, f"delta-{count}"), base)
            seconds = [plan_seconds(base, delta) for _ in range(options.rounds)]
            rows.append({"tensors": count, "shards": shards, "seconds": seconds, "best": min(seconds)})
    cells = [(r["tensors"], r["shards"], f"{r['best']:.2f}", f"{r['best'] / r['tensors'] * 1e6:.0f}") for r in rows]
    print(table(("tensors", "shards", "CPU s", "us a tensor"), cells))
    if options.json:
        write_json(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
