"""Work on a series of batches by several threads or processes; the results come in the order of the batches."""

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from pema_adapters.errors import PemaError
from pema_adapters.scanning.tokenization import Batch, BatchTokenizer, EncodedBatch

THREADS = 2  # one takes ids out of Rust while the other is in there


class WorkerPool:
    """Tokenize batches: `num_proc` processes, or else threads around Rust, or else here and now. A context manager."""

    def __init__(self, num_proc: int = 1) -> None:
        self.num_proc = num_proc
        self._work: BatchTokenizer | None = None
        self._pool: Executor | None = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode_batches(self, work: BatchTokenizer, batches: Iterable[Batch]) -> Iterator[EncodedBatch]:
        """`work` of each batch, in order; a few batches are read ahead.

        Raises:
            PemaError: a process ended before its work did.
            What `work` raises, and what `batches` raises, each after the results of the batches before it.
        """
        if self.num_proc == 1 and not work.in_rust:  # a tokenizer in Python may be at one text at a time
            yield from map(work, batches)
            return
        self._start(work)
        try:
            yield from _run_in_order(self._submit, batches, 1 + max(THREADS, 2 * self.num_proc))
        except BrokenProcessPool as error:
            raise PemaError(
                f"one of {self.num_proc} worker processes ended in the middle of its work: killed, for want of memory? "
                "Try fewer, --num-proc"
            ) from error

    def _start(self, work: BatchTokenizer) -> None:
        if self._work is work:
            return
        self.__exit__()
        self._work = work
        if self.num_proc == 1:
            self._pool = ThreadPoolExecutor(THREADS)
            return
        _check_picklable(work)
        cores = max(1, (os.cpu_count() or 1) // self.num_proc)
        # a fork amid Rust's and Arrow's threads may hang: fresh processes
        options: dict[str, Any] = {"mp_context": get_context("spawn"), "initializer": _initialize_worker}
        self._pool = ProcessPoolExecutor(self.num_proc, initargs=(work, cores), **options)

    def _submit(self, batch: Batch) -> "Future[EncodedBatch]":
        assert self._pool is not None and self._work is not None
        return self._pool.submit(self._work if self.num_proc == 1 else _run_in_worker, batch)


def _check_picklable(work: BatchTokenizer) -> None:
    try:
        pickle.dumps(work)
    except Exception as error:  # whatever parts of a tokenizer raise: those written in Python cannot be pickled
        raise PemaError(
            f"this tokenizer cannot be given to other processes ({error}): scan in one, without --num-proc"
        ) from error


def _run_in_order(
    submit: Callable[[Batch], "Future[EncodedBatch]"], batches: Iterable[Batch], window: int
) -> Iterator[EncodedBatch]:
    waiting: deque[Future[EncodedBatch]] = deque()
    left, failure = iter(batches), None
    while True:
        try:
            waiting.append(submit(next(left)))
        except StopIteration:
            break
        except Exception as error:  # is raised when its turn comes
            failure = error
            break
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
    if failure is not None:
        raise failure


_worker_tokenizer: list[BatchTokenizer] = []  # of a worker process


def _initialize_worker(work: BatchTokenizer, cores: int) -> None:
    """In a new process: no Ctrl-C, which is the parent's, its share of the cores, and an end with the parent's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("RAYON_NUM_THREADS", str(cores))
    exit_with_parent()
    _worker_tokenizer[:] = [work]


def exit_with_parent() -> None:
    """In a process of multiprocessing: end when the parent does, which has no time for that where it is killed."""
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run_in_worker(batch: Batch) -> EncodedBatch:
    return _worker_tokenizer[0](batch)
