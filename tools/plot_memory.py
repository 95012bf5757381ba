"""Plot peak memory of training with and without PEMA: the picture in README.md.

    python tools/plot_memory.py [--results FILE] [--output FILE]

Reads the table of `compacter_table.py --model xlmr`, which `tools/results/` holds.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = {"Full fine-tuning": "full fine-tuning", "LoRA": "LoRA", "Compacter": "Compacter"}
"""The methods of the table, and how the plot calls them."""
WAYS = {
    "paper": ("without PEMA", "#b0b7c3"),
    "rows trained": ("PEMA, rows trained", "#2f6fbb"),
    "rows frozen": ("PEMA, rows frozen", "#8fb8e8"),
}
"""The columns of the table, and how the plot shows them."""


def read_megabytes(path: Path) -> dict[str, list[float]]:
    """Return the peaks of `METHODS` above what the imports take, in MB, one for each of `WAYS`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["figures"]["cells"]
    return {
        label: [(cells[method][way]["peak_bytes"] - cells[method][way]["floor_bytes"]) / 1e6 for way in WAYS]
        for method, label in METHODS.items()
    }


def plot(peaks: dict[str, list[float]], output: Path) -> None:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    height = 0.26
    for number, (label, color) in enumerate(WAYS.values()):
        places = [place + (number - 1) * height for place in range(len(peaks))]
        values = [found[number] / 1000 for found in peaks.values()]
        bars = axes.barh(places, values, height, label=label, color=color)
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
