"""Reading the token ids of text: tokenized a batch at a time, marked in order, nothing stored.

    scan_text(load_dataset("nyu-mll/glue", "rte"), Encoder(tokenizer), vocab_size=250_002).tokens

However many threads or processes tokenize, one marks, so that the growth curve and the errors are the same.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from pema_adapters.scanning.bitmap import GrowingBitmap
from pema_adapters.scanning.iteration import estimate_length
from pema_adapters.scanning.progress import Checkpointer, ScanProgress, ScanState, open_scan_bar
from pema_adapters.scanning.scanner import Scan, Scanner
from pema_adapters.scanning.text_columns import Encoder, SplitPlan
from pema_adapters.scanning.tokenization import EncodedBatch, preserve_settings
from pema_adapters.scanning.validation import DEFAULT_COLUMNS, validate_num_proc, validate_vocab_size
from pema_adapters.scanning.worker_pool import WorkerPool


class ResumeStore(Checkpointer, Protocol):
    """What makes a scan go on where it was interrupted."""

    def load_state(self) -> ScanState | None:
        """The state to go on from; None: from the start."""

    def handle_interrupt(self) -> None:
        """Ctrl-C: store the state that was kept last."""


def scan_text(  # noqa: PLR0913 - the settings of one call, by name
    data: Any,
    encoder: Encoder,
    *,
    vocab_size: int,
    progress: bool | None = None,
    num_proc: int = 1,
    resuming: ResumeStore | None = None,
) -> Scan:
    """Tokenize text, a batch at a time, and scan the ids; nothing is stored, but by `resuming`.

    Args:
        data: a `datasets.Dataset` or `IterableDataset` with columns of text, or a dict of them. Where the columns
            are not named, splits that hold `input_ids` already are scanned as they are.
        encoder: the tokenizer, the columns of text, and where to truncate.
        vocab_size: V, the rows of the embedding.
        progress: as for `scan`.
        num_proc: the processes that tokenize. A fast tokenizer uses all cores within one already; it is those in
            Python that gain.
        resuming: keeps the state, of the same data and encoder only.

    Raises:
        VocabularyError: no such text columns (the message lists what is there), or an id outside [0, V).
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
        scan = _TextScanner(
            encoder,
            workers,
            Scanner(bitmap, DEFAULT_COLUMNS, ScanProgress(bitmap, bar, resuming, encoder.used), num_proc),
        )
        try:
            scan.scan_splits(plans, resuming.load_state() if resuming else None)
        except KeyboardInterrupt:
            if resuming is not None:
                resuming.handle_interrupt()
            raise
    used, notes = tuple(encoder.used), tuple(scan.scanner.notes)
    return Scan(np.flatnonzero(bitmap.seen), bitmap.tokens, used, bitmap.growth(), notes)


class _TextScanner:
    """Marks the ids of splits, one after the other."""

    def __init__(self, encoder: Encoder, workers: WorkerPool, scanner: Scanner) -> None:
        self.encoder = encoder
        self.workers = workers
        self.scanner = scanner

    def scan_splits(self, plans: list[SplitPlan], state: ScanState | None) -> None:
        """Mark all splits, or those that a state leaves."""
        steps, bitmap = self.scanner.progress, self.scanner.bitmap
        if state is not None and isinstance(bitmap, GrowingBitmap):
            steps.restore(state, bitmap)
            self.encoder.used.update(dict.fromkeys(state.columns))
            self.scanner.notes[f"an interrupted scan was gone on with, from row {state.rows:,}"] = None
        for number, plan in enumerate(plans):
            if number >= steps.split:
                skipped = steps.start_split(number)
                if plan.columns:
                    self.scan_text(plan, skipped)
                else:
                    self.scanner.scan_any(plan.split, (plan.name,))
        steps.finish()

    def scan_text(self, plan: SplitPlan, skipped: int) -> None:
        """Mark the ids of a split of text, behind its first batches."""
        work = self.encoder.choose_tokenizer(plan.sample)
        steps, row = self.scanner.progress, skipped * self.encoder.batch_rows
        steps.step = skipped
        for batch in self.workers.encode_batches(work, plan.iterate_batches(skipped)):
            if self.scanner.bitmap.mark(batch.ids, skip_negative=False) is not None:
                self.refuse_batch(plan, batch, row)
            row += batch.rows
            steps.advance(batch.rows)

    def refuse_batch(self, plan: SplitPlan, batch: EncodedBatch, first: int) -> None:
        """Name the place of the first id of a batch that is outside of V; the batch begins at row `first`."""
        outside = (batch.ids < 0) | (batch.ids >= len(self.scanner.bitmap.seen))
        position = int(np.flatnonzero(outside)[0])
        row, column = batch.locate(position)
        names = ",".join(plan.columns[column])
        self.scanner.refuse_id((plan.name, f"column {names!r}", f"row {first + row}"), int(batch.ids[position]))
