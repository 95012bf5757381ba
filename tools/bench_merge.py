"""A merge beside the plain copy of the same file, and beside the in-memory way.

    python tools/bench_merge.py [--dir FOLDER] [--rounds 5] [--json FILE]

A checkpoint of XLM-V-base's shape (V = 901,629, d = 768, 12 layers; 3.1 GB of noise) and an adapter of K = 60,000 rows.
Contestants take turns: `pema-merge` from the shell, its start included, and `cp` + fsync of model.safetensors. Both end
on disk; the outputs are removed, and the disk is idle, before the next one starts. The in-memory way (load, write rows,
save) runs once.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
from _bench import anonymous_bytes, in_child, parser, table, write_json

from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.formats.safetensors_file import encode_header, size_in_bytes

V, D, LAYERS, FEED_FORWARD, K = 901_629, 768, 12, 3072, 60_000
E = "roberta.embeddings.word_embeddings.weight"
NEEDED_BYTES = 11e9
MERGE = [sys.executable, "-c", "import sys; from pema_adapters.cli.merge import main; sys.exit(main())"]


def shapes() -> dict[str, tuple[int, ...]]:
    found = {E: (V, D), "roberta.embeddings.position_embeddings.weight": (514, D)}
    square, up, down = (D, D), (FEED_FORWARD, D), (D, FEED_FORWARD)
    parts = {"attention.self.query": square, "attention.self.key": square, "attention.self.value": square,
             "attention.output.dense": square, "intermediate.dense": up, "output.dense": down}  # fmt: skip
    for layer in range(LAYERS):
        for part, shape in parts.items():
            found[f"roberta.encoder.layer.{layer}.{part}.weight"] = shape
            found[f"roberta.encoder.layer.{layer}.{part}.bias"] = shape[:1]
    return found


def write_base(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "xlm-roberta", "vocab_size": V}))
    tensors = [(name, "F32", shape) for name, shape in shapes().items()]
    left = sum(size_in_bytes(dtype, shape) for _, dtype, shape in tensors)
    noise = (np.random.default_rng(0).standard_normal(4 << 20, dtype=np.float32) * 0.02).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(encode_header(tensors, {"format": "pt"}))
        while left:
            left -= file.write(noise[: min(left, len(noise))])


def write_delta(folder: Path, base: Path) -> None:
    folder.mkdir()
    checkpoint = Checkpoint.open(base)
    ids = np.sort(np.random.default_rng(1).choice(V, K, replace=False)).astype(np.int32)
    names = [name for name in checkpoint.tensors if name != E]
    fingerprint = Fingerprint.take(
        checkpoint, embedding=E, prefix="roberta", vocab_size=V, token_ids=ids, names=names
    ).to_array()
    config = {"config": {"architecture": "pema", "unseen": "base"}, "name": "task", "model_type": "xlm-roberta"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    parts = [("fingerprint", "U8", fingerprint.shape), ("token_ids", "I32", (K,)), ("weight", "F32", (K, D))]
    named = [(f"roberta.pema.adapters.task.{name}", dtype, shape) for name, dtype, shape in parts]
    rows = np.random.default_rng(2).standard_normal((K, D), dtype=np.float32)
    with (folder / "adapter.safetensors").open("wb") as file:
        for data in (encode_header(named, {}), fingerprint.tobytes(), ids.tobytes(), rows.tobytes()):
            file.write(data)


def merge(base: Path, delta: Path, output: Path) -> tuple[int, float]:
    """Returns the peak of the process's anonymous memory in bytes, and the seconds of the merge without the start."""
    command = [*MERGE, "--base", str(base), "--delta", str(delta), "--output", str(output), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit("pema-merge failed; its message is above")
    return peak, json.load(process.stdout)["seconds"]


def copy(base: Path, output: Path) -> None:
    output.mkdir()
    subprocess.run(["cp", base / "model.safetensors", output / "model.safetensors"], check=True)
    fd = os.open(output / "model.safetensors", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def in_memory(base: Path, delta: Path, output: Path) -> Generator[None, None, None]:
    import torch
    from safetensors.torch import load_file, save_file

    yield
    state = load_file(base / "model.safetensors")
    rows = load_file(delta / "adapter.safetensors")
    with torch.no_grad():
        state[E][rows["roberta.pema.adapters.task.token_ids"].long()] = rows["roberta.pema.adapters.task.weight"]
    output.mkdir()
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    fd = os.open(output / "model.safetensors", os.O_RDONLY)
    os.fsync(fd)


def seconds_of(work: Callable[[], object]) -> tuple[float, object]:
    os.sync()
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def race(base: Path, delta: Path, output: Path, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of both in each counted round, and the highest peak of the merge. The first round warms the cache."""
    contestants = {"cp + fsync": lambda: copy(base, output), "pema-merge": lambda: merge(base, delta, output)}
    times: dict[str, list[float]] = {name: [] for name in (*contestants, "merge_checkpoint")}
    peak = 0
    for number in range(rounds + 1):
        for name in list(contestants)[:: 1 if number % 2 else -1]:
            seconds, result = seconds_of(contestants[name])
            shutil.rmtree(output)
            if number:
                times[name].append(seconds)
            if result and number:
                peak = max(peak, result[0])
                times["merge_checkpoint"].append(result[1])
    return times, peak


def best_help() -> float:
    runs = [
        seconds_of(lambda: subprocess.run([*MERGE, "--help"], check=True, capture_output=True))[0] for _ in range(5)
    ]
    return min(runs)


def measure(folder: Path, rounds: int) -> dict[str, object]:
    base, delta, output = folder / "base", folder / "delta", folder / "merged"
    write_base(base)
    write_delta(delta, base)
    times, peak = race(base, delta, output, rounds)
    memory = in_child(in_memory, base, delta, output)
    best, median = ({name: f(runs) for name, runs in times.items()} for f in (min, statistics.median))
    return {
        "bytes": (base / "model.safetensors").stat().st_size,
        "rows": K,
        "seconds": times,
        "best": best,
        "median": median,
        "ratio_of_best": {name: best[name] / best["cp + fsync"] for name in best},
        "ratio_of_medians": {name: median[name] / median["cp + fsync"] for name in median},
        "anonymous_bytes": peak,
        "in_memory": {"seconds": memory.seconds, "anonymous_bytes": memory.peak},
        "help_seconds": best_help(),
    }


def show(figures: dict[str, object]) -> None:
    memory = figures["in_memory"]
    header = ["", "best s", "/ cp", "median s", "/ cp", "anonymous memory MB"]
    keys = ("best", "ratio_of_best", "median", "ratio_of_medians")
    rows = [[name, *(f"{figures[key][name]:.2f}" for key in keys)] for name in figures["best"]]
    rows[0] += ["-"]
    rows[1] += [f"{figures['anonymous_bytes'] / 1e6:.0f}"]
    rows[2] += ["the same process, without its start"]
    rows.append(["in memory (once)", f"{memory['seconds']:.2f}", "", "", "", f"{memory['anonymous_bytes'] / 1e6:.0f}"])
    print(f"merge of K = {K:,} rows into {figures['bytes'] / 1e9:.2f} GB (V = {V:,}, d = {D})")
    print(table(header, rows))
    print(f"pema-merge --help: {figures['help_seconds']:.2f} s")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dir", type=Path, help="work in a fresh folder below this one (default: the system's)")
    options = options.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        if shutil.disk_usage(name).free < NEEDED_BYTES:
            raise SystemExit(f"{name}: needs {NEEDED_BYTES / 1e9:.0f} GB free; choose another place with --dir")
        figures = measure(Path(name), options.rounds)
    show(figures)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
