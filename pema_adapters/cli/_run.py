"""What both commands share: exit codes, and errors as one line."""

import sys
from collections.abc import Callable

from pema_adapters.errors import PemaError
from pema_adapters.io.interrupts import Terminated, raise_on_sigterm

DONE, FAILED = 0, 1


def run(program: str, work: Callable[[], None]) -> int:
    """Run `work`; print a `PemaError` as one line on stderr. Returns the exit code: 0 done, 1 refused or failed."""
    try:
        with raise_on_sigterm():
            work()
    except (PemaError, OSError) as error:
        print(f"{program}: error: {_one_line(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as stop:
        how = "terminated" if isinstance(stop, Terminated) else "interrupted"
        print(f"{program}: {how}{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return FAILED
    return DONE


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
