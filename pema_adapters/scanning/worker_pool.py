"""Tokenize a series of batches in several threads or processes; results come in the order of the batches."""

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

THREADS = 2  # one copies ids out of Rust while the other runs in Rust


class WorkerPool:
    """Tokenizes batches in `num_proc` processes; with one, in threads around Rust or in this thread.

    A context manager, which shuts the workers down.
    """

    def __init__(self, num_proc: int = 1) -> None:
        self.num_proc = num_proc
        self._tokenizer: BatchTokenizer | None = None
        self._pool: Executor | None = None

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode_batches(self, tokenizer: BatchTokenizer, batches: Iterable[Batch]) -> Iterator[EncodedBatch]:
        """Tokenize batches; a few are read ahead.

        Args:
            tokenizer: tokenizes a batch.
            batches: an iterator over batches.

        Yields:
            The results in the order of the batches. An exception of the tokenizer or of the iterator is raised after
            the results of the batches before it.

        Raises:
            PemaError: a worker process died.
        """
        if self.num_proc == 1 and not tokenizer.in_rust:  # tokenizers in Python are not thread-safe
            yield from map(tokenizer, batches)
            return
        self._start(tokenizer)
        try:
            yield from _run_in_order(self._submit, batches, 1 + max(THREADS, 2 * self.num_proc))
        except BrokenProcessPool as error:
            raise PemaError(
                f"one of {self.num_proc} worker processes died while tokenizing, perhaps for lack of memory; "
                "try fewer, --num-proc"
            ) from error

    def _start(self, tokenizer: BatchTokenizer) -> None:
        if self._tokenizer is tokenizer:
            return
        self.__exit__()
        self._tokenizer = tokenizer
        if self.num_proc == 1:
            self._pool = ThreadPoolExecutor(THREADS)
            return
        _check_picklable(tokenizer)
        cores = max(1, (os.cpu_count() or 1) // self.num_proc)
        # spawn: a fork may hang, because Rust and Arrow run threads
        options: dict[str, Any] = {"mp_context": get_context("spawn"), "initializer": _initialize_worker}
        self._pool = ProcessPoolExecutor(self.num_proc, initargs=(tokenizer, cores), **options)

    def _submit(self, batch: Batch) -> "Future[EncodedBatch]":
        assert self._pool is not None and self._tokenizer is not None
        return self._pool.submit(self._tokenizer if self.num_proc == 1 else _run_in_worker, batch)


def _check_picklable(tokenizer: BatchTokenizer) -> None:
    try:
        pickle.dumps(tokenizer)
    except Exception as error:  # of any class: parts of a tokenizer written in Python cannot be pickled
        raise PemaError(
            f"cannot send this tokenizer to other processes ({error}); scan in one process, without --num-proc"
        ) from error


def _run_in_order(
    submit: Callable[[Batch], "Future[EncodedBatch]"], batches: Iterable[Batch], window: int
) -> Iterator[EncodedBatch]:
    pending: deque[Future[EncodedBatch]] = deque()
    remaining, failure = iter(batches), None
    while True:
        try:
            pending.append(submit(next(remaining)))
        except StopIteration:
            break
        except Exception as error:  # raised after the results of earlier batches
            failure = error
            break
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
    if failure is not None:
        raise failure


_worker_tokenizer: list[BatchTokenizer] = []  # the tokenizer of this worker process


def _initialize_worker(tokenizer: BatchTokenizer, cores: int) -> None:
    """Set up a worker process: ignore Ctrl-C, which the parent handles, limit the cores, exit with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("RAYON_NUM_THREADS", str(cores))
    exit_with_parent()
    _worker_tokenizer[:] = [tokenizer]


def exit_with_parent() -> None:
    """Exit this worker process when its parent exits, even if the parent is killed."""
    parent = parent_process()

    def wait_for_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _run_in_worker(batch: Batch) -> EncodedBatch:
    return _worker_tokenizer[0](batch)
