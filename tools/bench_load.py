"""Loading a model with K of V embedding rows: `load_model` beside its peers, each in a fresh process.

    python tools/bench_load.py [--rounds 5] [--stored shards bin] [--dtype bfloat16] [--dir FOLDER] [--json FILE]

XLM-V-base's shape, noise, 3.1 GB on disk. Contestants: from_pretrained of a checkpoint of K rows (the floor),
`load_model` of K of V rows, and from_pretrained of all. The order turns every round, and ratios are of the same round.
All files are read once before, and every process first loads a tiny model in its way, which imports what it needs.

Memory is anonymous memory (RssAnon), the peak of the process less what it had before; time is that of the same part.
"as loaded": the call alone, which leaves weights as pages of the file unless --dtype casts them. "held": each weight is
then copied into memory of the process, one after another, as training or moving it would.
"""

import argparse
import gc
import shutil
import statistics
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import Child, in_child, median_ratio, parser, table, write_json
from _merge_shapes import Shape, write_base
from transformers import XLMRobertaModel

from pema_adapters import PartialVocabulary, load_model

FLOOR, OURS, FULL = "from_pretrained, K rows", "load_model, K of V rows", "from_pretrained, V rows"
STORED: dict[str, dict[str, Any]] = {
    "safetensors": {"max_shard_size": "10GB"},
    "shards": {"max_shard_size": "1GB"},
    "bin": {"max_shard_size": "10GB", "safe_serialization": False},
}
WAYS, KINDS, COLUMNS = [FLOOR, OURS, FULL], ("as loaded", "held"), ("s", "x K rows", "peak MB", "over K rows")
MEGA = 1e6


def token_ids(vocabulary: int, rows: int) -> np.ndarray[Any, Any]:
    """K of V ids, those that the model inserts (0, 1, 2) among them."""
    drawn = np.random.default_rng(0).choice(np.arange(3, vocabulary), rows - 3, replace=False)
    return np.sort(np.concatenate([[0, 1, 2], drawn]))


@dataclass(frozen=True)
class Bases:
    """Checkpoints in `folder`: `full`, of a shape with V rows, and `partial`, with K of them; `dtype` to load."""

    folder: Path
    shape: Shape
    rows: int
    dtype: str

    def write(self, stored: str) -> None:
        for name, shape in {"full": self.shape, "partial": Shape(self.rows, self.shape.layers)}.items():
            write_base(self.folder / name, shape)
            if stored != "safetensors":
                noise = (self.folder / name).rename(self.folder / "noise")
                model = XLMRobertaModel.from_pretrained(noise, add_pooling_layer=False)
                model.save_pretrained(self.folder / name, **STORED[stored])
                shutil.rmtree(noise)

    def load(self, way: str) -> Any:
        plain = {"add_pooling_layer": False, "dtype": self.dtype}
        if way != OURS:
            return XLMRobertaModel.from_pretrained(self.folder / ("partial" if way == FLOOR else "full"), **plain)
        vocabulary = PartialVocabulary(token_ids(self.shape.rows, self.rows), self.shape.rows)
        return load_model(XLMRobertaModel, self.folder / "full", vocabulary, **plain)


def load(way: str, tiny: Bases, bases: Bases, held: bool) -> Generator[None, None, None]:
    tiny.load(way)
    gc.collect()
    yield
    model = bases.load(way)
    for tensor in [*model.parameters(), *model.buffers()] if held else []:
        tensor.data = tensor.data.clone()


def read_once(folder: Path) -> None:
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb", buffering=0) as opened:
            while opened.read(16 << 20):
                pass


def measure(tiny: Bases, bases: Bases, rounds: int) -> dict[str, dict[str, list[Child]]]:
    """What every round saw: as loaded, and held; by contestant."""
    found: dict[str, dict[str, list[Child]]] = {kind: {name: [] for name in WAYS} for kind in KINDS}
    for number in range(rounds):
        for name in WAYS[number % 3 :] + WAYS[: number % 3]:
            for kind in KINDS:
                found[kind][name].append(in_child(load, name, tiny, bases, kind == "held"))
    return found


def figures(found: dict[str, dict[str, list[Child]]]) -> list[dict[str, Any]]:
    lines = []
    for name in WAYS:
        line: dict[str, Any] = {"way": name}
        for kind, children in found.items():
            seconds = {way: [child.seconds for child in those] for way, those in children.items()}
            line[kind] = {
                "seconds": statistics.median(seconds[name]),
                "times_floor": median_ratio(seconds, name, FLOOR),
                "bytes": statistics.median(child.grown for child in children[name]),
            }
        lines.append(line)
    return lines


def show(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        cells = [line["way"]]
        for kind in KINDS:
            more = (line[kind]["bytes"] - lines[0][kind]["bytes"]) / MEGA
            cells += [f"{line[kind]['seconds']:.2f}", f"{line[kind]['times_floor']:.2f}"]
            cells += [f"{line[kind]['bytes'] / MEGA:,.0f}", f"{more:+,.0f}"]
        rows.append(cells)
    return table(["way", *(f"{kind}: {what}" for kind in KINDS for what in COLUMNS)], rows)


def main() -> None:
    options = parse()
    shape, results = Shape(options.vocabulary, options.layers), {}
    print(
        f"XLM-RoBERTa, {shape.layers} layers, V = {shape.rows:,}, K = {options.rows:,}, float32 on disk, "
        f"dtype {options.dtype}, {options.rounds} rounds, {torch.get_num_threads()} threads"
    )
    for stored in options.stored:
        with tempfile.TemporaryDirectory(dir=options.dir) as name:
            tiny = Bases(Path(name, "tiny"), Shape(100, 1), 50, options.dtype)
            bases = Bases(Path(name), shape, options.rows, options.dtype)
            tiny.folder.mkdir()
            tiny.write(stored)
            bases.write(stored)
            read_once(bases.folder)
            results[stored] = figures(measure(tiny, bases, options.rounds))
        print(f"\n{stored}\n\n{show(results[stored])}", flush=True)
    given = {key: str(value) for key, value in vars(options).items() if key != "json"}
    write_json(options.json, {"options": given, "figures": results})


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.add_argument("--stored", nargs="+", choices=STORED, default=[*STORED])
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--vocabulary", type=int, default=901_629, metavar="V")
    options.add_argument("--rows", type=int, default=20_000, metavar="K")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--dir", type=Path, help="where to write the checkpoints (default: the temporary folder)")
    return options.parse_args()


if __name__ == "__main__":
    main()
