"""Merges beside the plain copy of the same file, and beside the ways that load the model into memory.

    python tools/bench_merge.py [--dir FOLDER] [--rounds 5] [--skip NAME] [--mergekit PYTHON]
                                [--json FILE] [--save]

A checkpoint of XLM-V-base's shape (V = 901,629, d = 768, 12 layers; 3.1 GB of noise), an adapter of K = 60,000 rows,
and one of the same rows with LoRA (r = 8) on q, k, v and both feed-forward matrices.

Contestants take turns, each a fresh process from the shell, its start included: `cp` + fsync of model.safetensors, a
merge of the rows, one that folds LoRA as well, and one of the rows in place. All end on disk; outputs are removed, a
base merged in place is put back, and the disk is idle, before the next one starts. Peers that hold the model in memory
run once: transformers + adapters, and mergekit if `--mergekit` names the interpreter of an environment that has it.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from harness.checkpoints import (
    LORA,
    MERGE,
    ROWS,
    WEIGHTS,
    Run,
    Shape,
    lora_tensors,
    merge,
    run,
    sync_file,
    write_base,
    write_delta,
    write_tensors,
)
from harness.child import run_in_child
from harness.command_line import add_dir, make_parser
from harness.results import write_results
from harness.tables import format_table
from harness.timing import format_ratio, rotate, round_ratios

SHAPE, K = Shape(901_629, 12), 60_000
NEEDED_BYTES = 14e9
CP = "cp + fsync"
AIMS = {"rows": (1.15, 64), "rows + LoRA": (1.5, 400), "rows, in place": (0.5, 64)}
"""Of each merge: the most times `cp`, and the most MB of anonymous memory."""
PEFT_TARGETS = r".*\.(query|key|value|intermediate\.dense|layer\.\d+\.output\.dense)"


class Place(NamedTuple):
    """The folders of a bench."""

    folder: Path
    base: Path
    rows: Path
    lora: Path
    output: Path

    @classmethod
    def below(cls, folder: Path) -> "Place":
        return cls(folder, *(folder / name for name in ("base", "rows", "lora", "merged")))


@dataclass(frozen=True)
class Contestant:
    """`work` is timed; `restore` afterwards makes everything as it was."""

    name: str
    work: Callable[[], Run | None]
    restore: Callable[[], object]


@dataclass
class Score:
    """Of each counted round: seconds, those that the merge itself reports, and the peak of memory in bytes."""

    seconds: list[float] = field(default_factory=list)
    inside_seconds: list[float] = field(default_factory=list)
    anonymous_bytes: list[int] = field(default_factory=list)

    def add(self, seconds: float, result: Run | None) -> None:
        self.seconds.append(seconds)
        if result:
            self.inside_seconds.append(json.loads(result.output)["seconds"])
            self.anonymous_bytes.append(result.peak)


def prepare(place: Place) -> None:
    write_base(place.base, SHAPE)
    write_delta(place.rows, place.base, SHAPE, K)
    write_delta(place.lora, place.base, SHAPE, K, lora=True)


def copy(place: Place) -> None:
    place.output.mkdir()
    subprocess.run(["cp", place.base / WEIGHTS, place.output / WEIGHTS], check=True)
    sync_file(place.output / WEIGHTS)


def contestants(place: Place) -> list[Contestant]:
    remove, undo = partial(shutil.rmtree, place.output), partial(merge, place.base, "--undo")
    into = ("--output", place.output, "--json")
    return [
        Contestant(CP, partial(copy, place), remove),
        Contestant("rows", partial(merge, place.base, "--delta", place.rows, *into), remove),
        Contestant("rows + LoRA", partial(merge, place.base, "--delta", place.lora, *into), remove),
        Contestant("rows, in place", partial(merge, place.base, "--delta", place.rows, "--in-place", "--json"), undo),
    ]


def race(entrants: list[Contestant], rounds: int) -> dict[str, Score]:
    """Run every contestant once a round. The first round, uncounted, warms the cache."""
    scores = {one.name: Score() for one in entrants}
    for number, order in enumerate(rotate(entrants, rounds + 1)):
        for one in order:
            seconds, result = time_work(one.work)
            one.restore()
            if number:
                scores[one.name].add(seconds, result)
    return scores


def time_work(work: Callable[[], Any]) -> tuple[float, Any]:
    """Run work that begins with an idle disk. Returns its seconds and its result."""
    os.sync()
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def in_memory(base: Path, delta: Path, output: Path) -> Generator[None, None, None]:
    """Load the model, merge LoRA, set the rows and save: the ordinary way."""
    import adapters
    import torch
    from adapters import LoRAConfig
    from safetensors.torch import load_file
    from transformers import AutoModel

    yield
    tensors = load_file(delta / ROWS)
    rows, ids = (tensors.pop(f"roberta.pema.adapters.task.{name}") for name in ("weight", "token_ids"))
    model = AutoModel.from_pretrained(base)
    adapters.init(model)
    model.add_adapter("task", config=LoRAConfig(**LORA))
    parts = {name.removeprefix("roberta."): tensor for name, tensor in tensors.items() if ".loras." in name}
    if model.load_state_dict(parts, strict=False).unexpected_keys:
        raise RuntimeError("this version of adapters names LoRA's tensors otherwise")
    model.merge_adapter("task")
    with torch.no_grad():
        model.get_input_embeddings().weight[ids.long()] = rows
    model.save_pretrained(output)
    sync_file(output / WEIGHTS)


def run_in_memory(place: Place) -> dict[str, Any]:
    os.sync()
    child = run_in_child(in_memory, place.base, place.lora, place.output)
    shutil.rmtree(place.output)
    return {"seconds": child.seconds, "anonymous_bytes": child.peak}


def run_mergekit(place: Place, python: Path) -> dict[str, Any]:
    """Have mergekit fold the same LoRA without the rows: in memory into a cache, and streamed from there."""
    folder = place.folder / "mergekit"
    write_mergekit(folder, place.base)
    command = [
        python.parent / "mergekit-yaml",
        folder / "merge.yml",
        place.output,
        "--lora-merge-cache",
        folder / "cache",
    ]
    try:
        seconds, result = time_work(lambda: run_and_sync(command, place.output / WEIGHTS))
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(place.output, ignore_errors=True)
    return {"seconds": seconds, "anonymous_bytes": result.peak}


def run_and_sync(command: list[str | Path], path: Path) -> Run:
    result = run(command)
    sync_file(path)
    return result


def write_mergekit(folder: Path, base: Path) -> None:
    """Write the base and the LoRA as mergekit wants them.

    It knows no XLM-RoBERTa, and cannot infer an architecture where LoRA is involved, so the base is called RoBERTa,
    which has the same tensors; and of the RoBERTas that it knows, only those with a head are named as they are stored.
    """
    model, lora = folder / "base", folder / "lora"
    for path in (model, lora):
        path.mkdir(parents=True)
    os.link(base / WEIGHTS, model / WEIGHTS)
    known = {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}
    (model / "config.json").write_text(json.dumps(SHAPE.config() | known))
    tensors = {name.replace(".loras.task.", ".") + ".weight": part for name, part in lora_tensors(SHAPE).items()}
    write_tensors(
        lora / "adapter_model.safetensors", {f"base_model.model.{name}": part for name, part in tensors.items()}
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "target_modules": PEFT_TARGETS}
    config |= {"r": LORA["r"], "lora_alpha": LORA["alpha"], "inference_mode": True}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{model}+{lora}"}], "dtype": "float32"}
    (folder / "merge.yml").write_text(json.dumps(recipe))  # JSON is YAML


def time_help() -> float:
    start = partial(subprocess.run, [*MERGE, "--help"], check=True, capture_output=True)
    return min(time_work(start)[0] for _ in range(5))


def measure(place: Place, options: Namespace) -> dict[str, Any]:
    prepare(place)
    scores = race([one for one in contestants(place) if one.name not in options.skip], options.rounds)
    peers = {} if "in memory" in options.skip else {"in memory": run_in_memory(place)}
    if options.mergekit:
        peers["mergekit"] = run_mergekit(place, options.mergekit)
    return {
        "bytes": (place.base / WEIGHTS).stat().st_size,
        "rows": K,
        "merges": {name: vars(score) for name, score in scores.items()},
        "peers": peers,
        "help_seconds": time_help(),
    }


def render(figures: dict[str, Any]) -> str:
    merges = figures["merges"]
    header = ["way", "median s", "/ cp, median (range)", "aim", "of it merging s", "anonymous MB", "aim"]
    rows = [_row(name, merges) for name in merges]
    cp = statistics.median(merges[CP]["seconds"])
    for name, peer in figures["peers"].items():
        if "seconds" in peer:
            ratio = f"{peer['seconds'] / cp:.2f} (one run)"
            memory = f"{peer['anonymous_bytes'] / 1e6:,.0f}"
            rows.append([f"{name}, once", f"{peer['seconds']:.2f}", ratio, "", "", memory, ""])
    caption = f"K = {K:,} rows into {figures['bytes'] / 1e9:.2f} GB (V = {SHAPE.rows:,}, {SHAPE.layers} layers)"
    errors = [f"{name}: {peer['error']}" for name, peer in figures["peers"].items() if "error" in peer]
    parts = [caption, format_table(header, rows), *errors, f"`pema-merge --help`: {figures['help_seconds']:.2f} s"]
    return "\n\n".join(parts)


def _row(name: str, merges: dict[str, Any]) -> list[str]:
    score, (times, memory) = merges[name], AIMS.get(name, ("", ""))
    seconds = {each: found["seconds"] for each, found in merges.items()}
    cells = [name, f"{statistics.median(score['seconds']):.2f}", format_ratio(round_ratios(seconds, name, CP))]
    if name not in AIMS:
        return [*cells, "", "", "", ""]
    inside, peak = statistics.median(score["inside_seconds"]), max(score["anonymous_bytes"])
    return [*cells, f"<= {times}", f"{inside:.2f}", f"{peak / 1e6:.0f}", f"<= {memory}"]


def main() -> None:
    parser = make_parser(__doc__, rounds=5)
    add = parser.add_argument
    add_dir(parser)
    add("--skip", action="append", default=[], choices=[*AIMS, "in memory"], help="leave out; may be repeated")
    add("--mergekit", type=Path, metavar="PYTHON", help="interpreter of an environment that has mergekit and peft")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        if shutil.disk_usage(name).free < NEEDED_BYTES:
            raise SystemExit(f"{name}: needs {NEEDED_BYTES / 1e9:.0f} GB free; choose another place with --dir")
        figures = measure(Place.below(Path(name)), options)
    print(render(figures))
    write_results(options, figures)


if __name__ == "__main__":
    main()
