"""A progress bar in bytes, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def bar(label: str, total: int, shown: bool | None) -> Iterator[Advance]:
    """Give a function to call with the number of bytes done. `shown`: None for where stderr is a terminal."""
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024) as progress:
        yield lambda count: (progress.update(count), None)[1]
