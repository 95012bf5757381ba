"""Run the commands without their console scripts: `python -m pema_adapters merge ...` or `... scan ...`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from pema_adapters.cli._common import add_version

COMMANDS = {
    "merge": "merge a delta into its base checkpoint (pema-merge)",
    "scan": "count the embedding rows that a data set uses (pema-scan)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pema_adapters", description="Partial Embedding Matrix Adaptation.")
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    return int(import_module(f"pema_adapters.cli.{command}").main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main())
