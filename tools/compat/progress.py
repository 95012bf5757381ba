"""A line of progress for each cell, on stderr."""

import sys
from typing import Any


def show_progress(result: Any, count: int, total: int, *, is_wrong: bool) -> None:
    """Print a result; on a terminal the next one overwrites it unless it is wrong."""
    end = "\r" if sys.stderr.isatty() and not is_wrong else "\n"
    line = f"{count}/{total} {', '.join(vars(result.cell).values())}: {result.status} {result.reason}"
    print(line[:160].ljust(100), end=end, file=sys.stderr, flush=True)
