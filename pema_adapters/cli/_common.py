"""Exit codes, one-line errors, standard output and --version, for both commands."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from pema_adapters import __version__
from pema_adapters.errors import PemaError
from pema_adapters.io.interrupts import Terminated, raise_on_signals

DONE, FAILED = 0, 1
_REPORTED_PACKAGES = ("numpy", "safetensors")
"""Packages whose versions --version shows: those that every command needs."""


def run(program: str, work: Callable[[], str], *, is_done_before_printing: bool = False) -> int:
    """Call `work` and print the text that it returns, or print its error as one line on stderr.

    Args:
        program: The name of the command, which starts every error.
        work: Does everything and returns the text for standard output.
        is_done_before_printing: Whether `work` writes its result to disk, so that failing to print is not a failure.

    Returns:
        The exit code: 0 done, 1 refused or failed. A reader that closes the pipe early counts as done.
    """
    try:
        with raise_on_signals():
            text = work()
    except (PemaError, OSError) as error:
        _print_error(f"{program}: error: {_one_line(error)}")
        return FAILED
    except KeyboardInterrupt as stop:
        how = "terminated" if isinstance(stop, Terminated) else "interrupted"
        _print_error(f"{program}: {how}{f'; {stop}' if str(stop) else ''}")
        return FAILED
    try:
        write_stdout(text)
    except BrokenPipeError:
        return DONE
    except OSError as error:
        done = "; all else is done" if is_done_before_printing else ""
        _print_error(f"{program}: error: standard output cannot be written ({error.strerror or error}){done}")
        return DONE if is_done_before_printing else FAILED
    return DONE


def write_stdout(text: str) -> None:
    """Print and flush the text, unless empty, with escapes for characters that standard output cannot encode.

    Raises:
        OSError: Standard output cannot be written. It is then redirected, so that no second error follows at exit.
    """
    stream = sys.stdout
    if not text or stream is None:  # None: closed before the program started
        return
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        _discard_stdout()
        raise


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`, which prints one line: this package, Python, and the packages that every command needs."""
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="print the versions of pema-adapters, Python and the required packages",
    )


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import platform

        packages = ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {_find_version(name)}" for name in _REPORTED_PACKAGES)]
        )
        sys.exit(run(parser.prog, lambda: f"{parser.prog} {__version__} ({packages})"))


def _find_version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _print_error(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _discard_stdout() -> None:
    """Redirect standard output to os.devnull: the interpreter would flush it again at exit, and fail again."""
    with contextlib.suppress(OSError, ValueError):  # not backed by a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
