"""Loading a model with K of V embedding rows: `load_model` beside its peers, each in a fresh process.

    python tools/bench_load.py [--rounds 5] [--stored shards bin] [--dtype bfloat16] [--dir FOLDER]
                               [--json FILE] [--save]

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

import torch
from transformers import XLMRobertaModel

from harness.checkpoints import Shape, write_base
from harness.child import Child, run_in_child
from harness.command_line import add_dir, make_parser
from harness.results import write_results
from harness.tables import format_table
from harness.timing import format_ratio, rotate, round_ratios
from harness.xlmr import choose_token_ids
from pema_adapters import PartialVocabulary, load_model

FLOOR, OURS, FULL = "from_pretrained, K rows", "load_model, K of V rows", "from_pretrained, V rows"
STORED: dict[str, dict[str, Any]] = {
    "safetensors": {"max_shard_size": "10GB"},
    "shards": {"max_shard_size": "1GB"},
    "bin": {"max_shard_size": "10GB", "safe_serialization": False},
}
WAYS, KINDS, COLUMNS = [FLOOR, OURS, FULL], ("as loaded", "held"), ("s", "/ K rows", "peak MB", "over K rows")
MEGA = 1e6


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
        vocabulary = PartialVocabulary(choose_token_ids(self.shape.rows, self.rows), self.shape.rows)
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
    """Return what every round saw, `{"as loaded" or "held": {contestant: children}}`."""
    found: dict[str, dict[str, list[Child]]] = {kind: {way: [] for way in WAYS} for kind in KINDS}
    for order in rotate(WAYS, rounds):
        for way in order:
            for kind in KINDS:
                found[kind][way].append(run_in_child(load, way, tiny, bases, kind == "held"))
    return found


def measure_stored(stored: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and bytes of all rounds for one way of storing the checkpoints."""
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        tiny = Bases(Path(name, "tiny"), Shape(100, 1), 50, options.dtype)
        bases = Bases(Path(name), Shape(options.vocabulary, options.layers), options.rows, options.dtype)
        tiny.folder.mkdir()
        tiny.write(stored)
        bases.write(stored)
        read_once(bases.folder)
        found = measure(tiny, bases, options.rounds)
    return {
        kind: {
            "seconds": {way: [child.seconds for child in children] for way, children in ways.items()},
            "bytes": {way: [child.grown for child in children] for way, children in ways.items()},
        }
        for kind, ways in found.items()
    }


def render(figures: dict[str, Any]) -> str:
    setting = figures["setting"]
    caption = (
        f"XLM-RoBERTa, {setting['layers']} layers, V = {setting['vocabulary']:,}, K = {setting['rows']:,}, float32 on "
        f"disk, dtype {setting['dtype']}, {setting['rounds']} rounds, {setting['threads']} threads"
    )
    header = ["stored", "way", *(f"{kind}: {what}" for kind in KINDS for what in COLUMNS)]
    rows = [[stored, *_row(found, way)] for stored, found in figures["stored"].items() for way in WAYS]
    return f"{caption}\n\n{format_table(header, rows)}"


def _row(found: dict[str, Any], way: str) -> list[str]:
    cells = [way]
    for kind in KINDS:
        seconds = found[kind]["seconds"]
        size, floor = (statistics.median(found[kind]["bytes"][each]) for each in (way, FLOOR))
        cells += [f"{statistics.median(seconds[way]):.2f}", format_ratio(round_ratios(seconds, way, FLOOR), floor=True)]
        cells += [f"{size / MEGA:,.0f}", f"{(size - floor) / MEGA:+,.0f}"]
    return cells


def main() -> None:
    options = parse()
    setting = {name: getattr(options, name) for name in ("layers", "vocabulary", "rows", "dtype", "rounds")}
    setting["threads"] = torch.get_num_threads()
    figures = {"setting": setting, "stored": {stored: measure_stored(stored, options) for stored in options.stored}}
    print(render(figures))
    write_results(options, figures)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--stored", nargs="+", choices=STORED, default=[*STORED])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=901_629, metavar="V")
    parser.add_argument("--rows", type=int, default=20_000, metavar="K")
    parser.add_argument("--dtype", default="float32")
    add_dir(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
