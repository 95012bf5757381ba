"""A progress bar in bytes, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def progress_bar(label: str, total: int, shown: bool | None) -> Iterator[Advance]:
    """Give a function to call with the number of bytes done. `shown`: None for where stderr is a terminal."""
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    if not (on_terminal if shown is None else shown):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024) as progress:
        yield lambda count: (progress.update(count), None)[1]
