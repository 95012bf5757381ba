"""The anonymous memory of a process: pages of mapped files do not count. For programs that tests start."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path


def anonymous():
    """RssAnon of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched():
    """Yields what tells by how many MiB memory grew during the block, at its peak."""
    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak[0] - before
    finally:
        done.set()
        thread.join()


def printed_by(program):
    """The last number that a program prints, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])
