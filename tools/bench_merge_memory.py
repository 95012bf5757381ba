"""The memory of a merge does not grow with the checkpoint.

    python tools/bench_merge_memory.py [--dir FOLDER] [--sizes 0.3 1 3 10] [--rounds 1] [--plot FILE.png] [--json FILE]

The peak of anonymous memory (RssAnon) of `pema-merge`, a fresh process each time, over checkpoints of several sizes:
half embedding matrix, half layers. The delta grows along: one row in fifteen, and LoRA (r = 8) on five matrices of
each layer, once left out and once folded in. Bases are sparse files of zeros; outputs are written in full, one at a
time, and removed at once.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from _bench import parser, table, write_json
from _merge_shapes import ROWS, WEIGHTS, Shape, merge, write_base, write_delta

SIZES = (0.3, 1.0, 3.0, 10.0)
ONE_ROW_IN = 15
ROOM = 1.2
"""Times the size of the largest checkpoint: an output and its delta."""
KINDS = {"rows": False, "rows + LoRA": True}


def peak(base: Path, delta: Path, output: Path) -> int:
    """Bytes of anonymous memory of one merge, whose output is removed."""
    found = merge(base, "--delta", delta, "--output", output).peak
    shutil.rmtree(output)
    return found


def measure(folder: Path, size: float, rounds: int) -> dict[str, Any]:
    """Both merges of one size, the highest of all rounds; nothing of it stays on the disk."""
    shape, base = Shape.of(size * 1e9), folder / "base"
    write_base(base, shape, sparse=True)
    peaks, deltas = {}, {}
    for kind, lora in KINDS.items():
        delta = folder / "delta"
        write_delta(delta, base, shape, shape.rows // ONE_ROW_IN, lora=lora)
        deltas[kind] = (delta / ROWS).stat().st_size
        peaks[kind] = max(peak(base, delta, folder / "merged") for _ in range(rounds))
        shutil.rmtree(delta)
    length = (base / WEIGHTS).stat().st_size
    shutil.rmtree(base)
    return {"bytes": length, "layers": shape.layers, "delta_bytes": deltas, "anonymous_bytes": peaks}


def show(found: list[dict[str, Any]]) -> None:
    header = ["checkpoint GB", "layers", "delta MB", *(f"{kind}: anonymous MB" for kind in KINDS)]
    rows = [
        [
            f"{one['bytes'] / 1e9:.2f}",
            one["layers"],
            f"{one['delta_bytes']['rows + LoRA'] / 1e6:.0f}",
            *(f"{one['anonymous_bytes'][kind] / 1e6:.0f}" for kind in KINDS),
        ]
        for one in found
    ]
    print(table(header, rows))


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    """Memory over size, with the size itself for comparison; both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    sizes = [one["bytes"] / 1e9 for one in found]
    for kind in KINDS:
        axes.plot(sizes, [one["anonymous_bytes"][kind] / 1e6 for one in found], "o-", label=f"pema-merge, {kind}")
    axes.plot(sizes, [size * 1e3 for size in sizes], "k:", label="the checkpoint itself")
    axes.set(xscale="log", yscale="log", xlabel="checkpoint (GB)", ylabel="peak of anonymous memory (MB)")
    axes.legend()
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    options = parser(__doc__, rounds=1)
    options.add_argument("--dir", type=Path, help="work in a fresh folder below this one (default: the system's)")
    options.add_argument("--sizes", type=float, nargs="+", default=SIZES, metavar="GB", help="of the checkpoints")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curve as well (needs matplotlib)")
    return options.parse_args()


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        needed = max(options.sizes) * ROOM
        if shutil.disk_usage(name).free < needed * 1e9:
            raise SystemExit(f"{name}: needs {needed:.1f} GB free; choose another place with --dir, or other --sizes")
        found = [measure(Path(name), size, options.rounds) for size in sorted(options.sizes)]
    show(found)
    write_json(options.json, {"sizes": found})
    if options.plot:
        plot(options.plot, found)


if __name__ == "__main__":
    main()
