"""Options that the tools share."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.results import RESULTS, describe_checkout


def make_parser(description: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with `--json FILE` and `--save`, and `--rounds N` where a default for it is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"counted rounds (default {rounds})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write a result file")
    parser.add_argument("--save", action="store_true", help=f"also write the result file of {RESULTS.name}/")
    parser.set_defaults(checkout=describe_checkout())  # as it is when the run begins
    return parser


def add_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--dir FOLDER`, where a tool makes its temporary folder."""
    parser.add_argument("--dir", type=Path, help="work in a fresh folder below this one (default: the system's)")


def some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names, all of them known."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
        return names

    return parse
