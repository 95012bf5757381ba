"""The command line that the recipes share."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from _tasks import Benchmark, plain
from _training import PEMA
from compacter_baselines import METHODS

from pema_adapters.analysis.heaps_law import known_format
from pema_adapters.errors import PemaError

FULL = "Full fine-tuning"
PEFT_LEARNING_RATE = 1e-3
"""For what trains few weights. Table 8 is about full fine-tuning; nothing was tuned here."""


def parse(benchmark: Benchmark, doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, help="folder or Hub id of the model")
    of = listed_of(benchmark.tasks)
    add("--tasks", type=of, default=list(benchmark.tasks), help=f"of {', '.join(benchmark.tasks)} (default: all)")
    add("--methods", type=listed_of(METHODS), default=[FULL], help=f'of {", ".join(METHODS)} (default: "{FULL}")')
    add("--pema", type=listed_of(PEMA), default=["off", "on"], help=f"of {', '.join(PEMA)} (default: off,on); "
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
    """End in one line what options that are right by themselves cannot do together, before anything is loaded."""
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
    """The methods, each with what `--pema` says."""
    return [
        (method, pema)
        for method in options.methods
        for pema in options.pema
        if (method, pema) != (FULL, "frozen")  # the rows would be left out of what is fine-tuned fully
    ]


def is_folder(path: Path, output: Path) -> bool:
    """Whether this is one, or will be once there are results: --output is made with all folders above it."""
    made = output.resolve()
    return path.is_dir() or path.resolve() in {made, *made.parents}


def listed_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads a comma-separated list of known names, whatever their case and punctuation."""
    by_name = {plain(name): name for name in known}

    def names(text: str) -> list[str]:
        asked = [part.strip() for part in text.split(",")]
        unknown = [part for part in asked if plain(part) not in by_name]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(by_name.values())}")
        return [by_name[plain(part)] for part in asked]

    return names


def figure(text: str) -> Path:
    """Reads the path of a figure. Its folder is for `refuse`: it may be --output, which does not exist yet."""
    path = Path(text)
    try:
        known_format(text)
    except PemaError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder, expected a file")
    return path


def numbers(text: str) -> list[int]:
    """Reads a comma-separated list."""
    return [int(part) for part in text.split(",")]
