"""Plot peak memory of training with and without PEMA: the picture in README.md.

    python tools/plot_memory.py [--results FILE] [--output FILE]

Reads the table of `compacter_table.py --model xlmr`, which `tools/results/` holds.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("full fine-tuning", "LoRA", "Compacter")
WAYS = {"without PEMA": "#b0b7c3", "PEMA, rows trained": "#2f6fbb", "PEMA, rows frozen": "#8fb8e8"}


def read_megabytes(path: Path) -> dict[str, list[float]]:
    """Return the peaks of `METHODS` in MB, one for each of `WAYS`."""
    table = json.loads(path.read_text(encoding="utf-8"))["table"]
    rows = {method: cells for method, *cells in table["rows"]}
    columns = [table["header"].index(way) - 1 for way in WAYS]
    return {method: [parse_megabytes(rows[method][column]) for column in columns] for method in METHODS}


def parse_megabytes(cell: str) -> float:
    """Return 6479 for "6,479 MB, 100 %"."""
    return float(cell.partition(" MB")[0].replace(",", ""))


def plot(peaks: dict[str, list[float]], output: Path) -> None:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    height = 0.26
    for number, (way, color) in enumerate(WAYS.items()):
        places = [place + (number - 1) * height for place in range(len(peaks))]
        values = [found[number] / 1000 for found in peaks.values()]
        bars = axes.barh(places, values, height, label=way, color=color)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(peaks)), list(peaks))
    axes.invert_yaxis()
    axes.set_xlabel(
        "peak memory of training, GB (XLM-R-base's shape, V = 250,002, K = 20,000, batch 8 x 64, AdamW fp32)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "compacter_table-xlmr.json", metavar="FILE")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.png", metavar="FILE")
    options = parser.parse_args()
    plot(read_megabytes(options.results), options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
