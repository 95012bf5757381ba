"""Collect the token ids of text: tokenize it batch by batch, mark the ids in order, store nothing.

    scan_text(load_dataset("nyu-mll/glue", "rte"), Encoder(tokenizer), vocab_size=250_002).tokens

Any number of threads or processes may tokenize. One thread marks, so the growth curve and the errors do not depend on
that number.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from pema_adapters.scanning.bitmap import GrowingBitmap
from pema_adapters.scanning.iteration import estimate_length
from pema_adapters.scanning.progress import Checkpointer, ScanProgress, ScanState, open_scan_bar
from pema_adapters.scanning.scan_errors import refuse_id
from pema_adapters.scanning.scanner import Scan, Scanner
from pema_adapters.scanning.text_columns import Encoder, SplitPlan
from pema_adapters.scanning.tokenization import EncodedBatch, preserve_settings
from pema_adapters.scanning.validation import DEFAULT_COLUMNS, validate_num_proc, validate_vocab_size
from pema_adapters.scanning.worker_pool import WorkerPool


class ResumeStore(Checkpointer, Protocol):
    """Keeps the state of an interrupted scan until the same scan resumes."""

    def load_state(self) -> ScanState | None:
        """Return the state to resume from; None to start from the beginning."""

    def handle_interrupt(self) -> None:
        """Store the last state, after Ctrl-C."""


def scan_text(  # noqa: PLR0913 - the settings of one call, by name
    data: Any,
    encoder: Encoder,
    *,
    vocab_size: int,
    progress: bool | None = None,
    num_proc: int = 1,
    resume_store: ResumeStore | None = None,
) -> Scan:
    """Tokenize text batch by batch, and collect the ids.

    Args:
        data: a `datasets.Dataset` or `IterableDataset` with columns of text, or a dict of them. If the encoder names
            no columns, splits that already hold `input_ids` are scanned as they are.
        encoder: the tokenizer, the columns of text, and the maximum length.
        vocab_size: V, the number of rows of the embedding.
        progress: as for `scan`.
        num_proc: the number of processes that tokenize. Fast tokenizers use all cores within one process; only
            tokenizers written in Python gain.
        resume_store: keeps the state of a scan of the same data with the same encoder.

    Raises:
        VocabularyError: the text columns do not exist, or an id is outside [0, V).
    """
    splits = data if isinstance(data, Mapping) else {"text": data}
    bitmap = GrowingBitmap(validate_vocab_size(vocab_size))
    num_proc = validate_num_proc(num_proc)
    plans = [encoder.plan(split, str(name)) for name, split in splits.items()]
    encoder.check_columns(list(map(str, splits)))
    with (
        open_scan_bar(estimate_length(data), progress) as bar,
        preserve_settings(encoder.tokenizer),
        WorkerPool(num_proc) as workers,
    ):
        scan_progress = ScanProgress(bitmap, bar, resume_store, encoder.used)
        scanner = Scanner(bitmap, DEFAULT_COLUMNS, scan_progress, num_proc)
        _scan_resumably(_TextScanner(encoder, workers, scanner, bitmap), plans, resume_store)
    columns, notes = tuple(encoder.used), tuple(scanner.notes)
    return Scan(np.flatnonzero(bitmap.seen), bitmap.tokens, columns, bitmap.growth, notes)


def _scan_resumably(scanner: "_TextScanner", plans: list[SplitPlan], store: ResumeStore | None) -> None:
    try:
        scanner.scan_splits(plans, store.load_state() if store else None)
    except KeyboardInterrupt:
        if store is not None:
            store.handle_interrupt()
        raise


class _TextScanner:
    """Marks the ids of splits of text, one split after the other."""

    def __init__(self, encoder: Encoder, workers: WorkerPool, scanner: Scanner, bitmap: GrowingBitmap) -> None:
        self.encoder = encoder
        self.workers = workers
        self.scanner = scanner
        self.bitmap = bitmap

    def scan_splits(self, plans: list[SplitPlan], state: ScanState | None) -> None:
        """Scan all splits, or the rest of them after a state."""
        progress = self.scanner.progress
        if state is not None:
            self._restore(state)
        for number, plan in enumerate(plans):
            if number < progress.split:
                continue
            skipped = progress.start_split(number)
            if plan.columns:
                self._scan_text_split(plan, skipped)
            else:
                self.scanner.scan_any(plan.split, (plan.name,))
        progress.finish()

    def _restore(self, state: ScanState) -> None:
        self.scanner.progress.restore(state, self.bitmap)
        self.encoder.used.update(dict.fromkeys(state.columns))
        self.scanner.notes[f"resumed an interrupted scan at row {state.rows:,}"] = None

    def _scan_text_split(self, plan: SplitPlan, skipped: int) -> None:
        """Scan a split of text after its first `skipped` batches."""
        tokenizer = self.encoder.choose_tokenizer(plan.sample)
        progress, row = self.scanner.progress, skipped * self.encoder.batch_rows
        progress.step = skipped
        for batch in self.workers.encode_batches(tokenizer, plan.iterate_batches(skipped)):
            if self.bitmap.mark(batch.ids, skip_negative=False) is not None:
                self._refuse_batch(plan, batch, row)
            row += batch.rows
            progress.advance(batch.rows)

    def _refuse_batch(self, plan: SplitPlan, batch: EncodedBatch, first_row: int) -> None:
        """Raise the error for the first id of a batch outside [0, V)."""
        vocab_size = self.bitmap.vocab_size
        position = int(np.flatnonzero((batch.ids < 0) | (batch.ids >= vocab_size))[0])
        row, column = batch.locate(position)
        names = ",".join(plan.columns[column])
        refuse_id((plan.name, f"column {names!r}", f"row {first_row + row}"), int(batch.ids[position]), vocab_size)
