"""Memory of training, on an accelerator or on the CPU."""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.child import anonymous_bytes


def copy_weights(model: torch.nn.Module) -> None:
    """Copy mapped weights into memory of the process, so that a frozen matrix counts, too."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    trim_memory()


def trim_memory() -> None:
    """Return freed memory to the system: it must not hide what is allocated next."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_memory() -> Iterator[Any]:
    """Watch memory during the block; the yielded function returns the peak in bytes, of the device or RssAnon."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    seen, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen[0] = max(seen[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: seen[0]
    finally:
        done.set()
        watcher.join()
