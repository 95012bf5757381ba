"""What both commands share: exit codes, errors as one line, standard output, and --version."""

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
    """Do `work` and print the text that it returns; print a `PemaError` as one line on stderr.

    is_done_before_printing: the result is on the disk already, so a summary that cannot be printed is no failure.

    Returns:
        The exit code: 0 done, 1 refused or failed. A reader that closes its pipe has read enough: 0.
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
    """Print and flush, with escapes for what the encoding of standard output lacks; nothing for empty text.

    Raises:
        OSError: it cannot be written. Then nothing more is, so that no second error follows at exit.
    """
    stream = sys.stdout
    if not text or stream is None:  # None: it was closed before the program began
        return
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        _discard_stdout()
        raise


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`: this package, Python, and the packages that every command needs, in one line."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions of pema-adapters and others")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import platform

        others = ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {_find_version(name)}" for name in _REPORTED_PACKAGES)]
        )
        sys.exit(run(parser.prog, lambda: f"{parser.prog} {__version__} ({others})"))


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
    with contextlib.suppress(OSError, ValueError):  # no file behind it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
