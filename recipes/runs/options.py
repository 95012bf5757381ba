"""The command line that the recipes share."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from compacter_baselines import METHODS
from harness.command_line import make_parser
from runs.tasks import Benchmark, plain
from runs.training import PEMA

FULL = "Full fine-tuning"
PEFT_LEARNING_RATE = 1e-3
"""For methods that train few weights. Table 8 is about full fine-tuning; nothing was tuned here."""


def parse(benchmark: Benchmark, doc: str) -> argparse.Namespace:
    parser = make_parser(doc)
    add = parser.add_argument
    add("--base", required=True, help="folder or Hub id of the model")
    of = known_names(benchmark.tasks)
    add("--tasks", type=of, default=list(benchmark.tasks), help=f"of {', '.join(benchmark.tasks)} (default: all)")
    add("--methods", type=known_names(METHODS), default=[FULL], help=f'of {", ".join(METHODS)} (default: "{FULL}")')
    add("--pema", type=known_names(PEMA), default=["off", "on"], help=f"of {', '.join(PEMA)} (default: off,on); "
        "frozen: K rows, which do not train")  # fmt: skip
    add("--seeds", type=numbers, default=[0, 1, 2], help="default: 0,1,2")
    add("--data-dir", type=Path, metavar="DIR", help="a folder for each task, with tsv files (default: the Hub)")
    output = Path("out") / benchmark.name.lower()
    add("--output", type=Path, default=output, metavar="DIR", help="default: %(default)s")
    add("--learning-rate", type=float, help="of full fine-tuning (default: 2e-5, 7.5e-6 for XLM models)")
    rate = PEFT_LEARNING_RATE
    add("--peft-learning-rate", type=float, default=rate, help="of all other methods (default: %(default)s)")
    add("--epochs", type=float, help=f"default: {benchmark.epochs:g}")
    add("--batch-size", type=int, default=32, help="default: %(default)s")
    add("--max-length", type=int, default=128, help="tokens (default: %(default)s)")
    add("--warmup-ratio", type=float, default=0.0, help="default: %(default)s")
    add("--weight-decay", type=float, default=0.0, help="default: %(default)s")
    add("--max-grad-norm", type=float, default=0.0, help="clip gradients (default: not)")
    rows = "train on a fixed subset of N rows (default: on all); one number, or one for each of --tasks"
    add("--train-rows", type=numbers, default=[0], metavar="N", help=rows)
    add("--bf16", action="store_true", help="automatic mixed precision in bfloat16")
    add("--group-by-length", action="store_true", help="batches of rows of like length, with less padding")
    add("--save-steps", type=int, default=0, metavar="N", help="a checkpoint each N steps, from which a run goes on")
    add("--threads", type=int, default=0, help="of the CPU, for each run (default: all)")
    add("--plot", type=figure, metavar="FILE.png", help="draw scores against memory (needs matplotlib)")
    options = parser.parse_args()
    refuse(parser, options)
    return options


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse combinations of options in one line, before anything is loaded."""
    found, tasks = len(options.train_rows), len(options.tasks)
    if found not in {1, tasks}:
        parser.error(f"--train-rows: found {found} numbers, expected 1, or {tasks}, one for each of --tasks")
    if not combinations(options):
        parser.error(
            f'nothing to run: found --methods "{FULL}" and --pema frozen, but what is fine-tuned fully has no frozen '
            "rows: give other --methods, such as LoRA, or --pema off,on"
        )
    if options.plot and not is_folder(options.plot.parent, options.output):
        parser.error(f"argument --plot: {options.plot}: no such folder: {options.plot.parent}")


def combinations(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the methods, each with each value of `--pema` that it has."""
    return [
        (method, pema)
        for method in options.methods
        for pema in options.pema
        if (method, pema) != (FULL, "frozen")  # the rows would be left out of what is fine-tuned fully
    ]


def is_folder(path: Path, output: Path) -> bool:
    """Whether the folder exists, or will once there are results: --output is made with all folders above it."""
    made = output.resolve()
    return path.is_dir() or path.resolve() in {made, *made.parents}


def known_names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated known names, whatever their case and punctuation."""
    by_name = {plain(name): name for name in known}

    def names(text: str) -> list[str]:
        asked = [part.strip() for part in text.split(",")]
        unknown = [part for part in asked if plain(part) not in by_name]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(by_name.values())}")
        return [by_name[plain(part)] for part in asked]

    return names


def figure(text: str) -> Path:
    """Parse the path of a figure. `refuse` checks its folder: it may be --output, which does not exist yet."""
    path = Path(text)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise argparse.ArgumentTypeError("figures need matplotlib: pip install matplotlib") from None
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        expected = ", ".join(f".{name}" for name in formats)
        raise argparse.ArgumentTypeError(f"{text}: found {path.suffix or 'no suffix'}, expected one of {expected}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder, expected a file")
    return path


def numbers(text: str) -> list[int]:
    """Parse a comma-separated list of numbers."""
    return [int(part) for part in text.split(",")]
