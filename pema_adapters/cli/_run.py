"""What both commands share: exit codes, and errors as one line."""

import sys
from collections.abc import Callable

from pema_adapters.errors import PemaError

DONE, FAILED = 0, 1


def run(program: str, work: Callable[[], None]) -> int:
    """Run `work`; print a `PemaError` as one line on stderr. Returns the exit code: 0 done, 1 refused or failed."""
    try:
        work()
    except (PemaError, OSError) as error:
        print(f"{program}: error: {_one_line(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as stop:
        print(f"{program}: interrupted; {str(stop) or 'nothing was left behind'}", file=sys.stderr)
        return FAILED
    return DONE


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
