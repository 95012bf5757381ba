"""Memory of a merge over checkpoints of growing size.

    python tools/bench_merge_memory.py [--dir FOLDER] [--sizes 0.3 1 3 10] [--rounds 1] [--plot FILE.png]
                                       [--json FILE] [--save]

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

from harness.checkpoints import ROWS, WEIGHTS, Shape, merge, write_base, write_delta
from harness.command_line import add_dir, make_parser
from harness.results import write_results
from harness.tables import format_table

SIZES = (0.3, 1.0, 3.0, 10.0)
ONE_ROW_IN = 15
SPACE = 1.2
"""Times the size of the largest checkpoint: an output and its delta."""
KINDS = {"rows": False, "rows + LoRA": True}


def measure_peak(base: Path, delta: Path, output: Path) -> int:
    """Return the anonymous memory of one merge in bytes, and remove its output."""
    found = merge(base, "--delta", delta, "--output", output).peak
    shutil.rmtree(output)
    return found


def measure(folder: Path, size: float, rounds: int) -> dict[str, Any]:
    """Measure both merges of one size in every round, and remove all files."""
    shape, base = Shape.of(size * 1e9), folder / "base"
    write_base(base, shape, sparse=True)
    peaks, deltas = {}, {}
    for kind, lora in KINDS.items():
        delta = folder / "delta"
        write_delta(delta, base, shape, shape.rows // ONE_ROW_IN, lora=lora)
        deltas[kind] = (delta / ROWS).stat().st_size
        peaks[kind] = [measure_peak(base, delta, folder / "merged") for _ in range(rounds)]
        shutil.rmtree(delta)
    length = (base / WEIGHTS).stat().st_size
    shutil.rmtree(base)
    return {"bytes": length, "layers": shape.layers, "delta_bytes": deltas, "anonymous_bytes": peaks}


def render(figures: dict[str, Any]) -> str:
    header = ["checkpoint GB", "layers", "delta MB", *(f"{kind}: anonymous MB" for kind in KINDS)]
    rows = [
        [
            f"{one['bytes'] / 1e9:.2f}",
            one["layers"],
            f"{one['delta_bytes']['rows + LoRA'] / 1e6:.0f}",
            *(f"{max(one['anonymous_bytes'][kind]) / 1e6:.0f}" for kind in KINDS),
        ]
        for one in figures["sizes"]
    ]
    return format_table(header, rows)


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    """Plot memory over size, with the size itself for comparison; both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    sizes = [one["bytes"] / 1e9 for one in found]
    for kind in KINDS:
        axes.plot(sizes, [max(one["anonymous_bytes"][kind]) / 1e6 for one in found], "o-", label=f"pema-merge, {kind}")
    axes.plot(sizes, [size * 1e3 for size in sizes], "k:", label="the checkpoint itself")
    axes.set(xscale="log", yscale="log", xlabel="checkpoint (GB)", ylabel="peak of anonymous memory (MB)")
    axes.legend()
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=1)
    add_dir(parser)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, metavar="GB", help="of the checkpoints")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curve as well (needs matplotlib)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        needed = max(options.sizes) * SPACE
        if shutil.disk_usage(name).free < needed * 1e9:
            raise SystemExit(f"{name}: needs {needed:.1f} GB free; choose another place with --dir, or other --sizes")
        found = [measure(Path(name), size, options.rounds) for size in sorted(options.sizes)]
    figures = {"sizes": found}
    print(render(figures))
    write_results(options, figures)
    if options.plot:
        plot(options.plot, found)


if __name__ == "__main__":
    main()
