"""What training takes in memory, on an accelerator or on the CPU."""

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def hold(model: torch.nn.Module) -> None:
    """Copy into memory what from_pretrained only mapped, so that a matrix that nobody trains counts, too."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    settle()


def settle() -> None:
    """Give back what the heap holds free: it is not of what comes next, nor there for it to use unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak_memory() -> Iterator[Any]:
    """The highest memory during the block, in bytes: the device's, or this process's anonymous memory."""
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


def anonymous_bytes() -> int:
    """RssAnon of this process: pages of mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")
