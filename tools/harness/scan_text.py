"""The text and the tokenizer of bench_scan.py: given files, or Python's standard library."""

import sysconfig
from collections.abc import Callable, Generator, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pema_adapters.scanning.data_files import load_data
from pema_adapters.scanning.text_columns import BATCH_ROWS, Encoder
from pema_adapters.scanning.text_scanner import scan_text

TRAINED_ROWS = 16_000
LINES = 5  # of a text


def read_texts(files: list[str], count: int) -> list[str]:
    """Return `count` texts: the string columns of data files, or parts of the standard library, repeated as needed."""
    rows = _read_strings(files) if files else _read_stdlib()
    texts = list(islice(rows, count))
    return list(islice(cycle(texts), count))


def _read_strings(files: list[str]) -> Iterator[str]:
    for data in load_data(files).values():
        for row in data:
            yield from (value for value in row.values() if isinstance(value, str))


def _read_stdlib() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines = path.read_text(errors="replace").splitlines()
        yield from (" ".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES))


def load_or_train_tokenizer(name: str | None, texts: list[str]) -> Any:
    """Load a tokenizer by name, or train a byte-level BPE on the texts."""
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=TRAINED_ROWS, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)


def text_contestants(tokenizer: Any, texts: list[str], dataset: Dataset) -> dict[str, Callable[[], Any]]:
    """Return the contestants, all on the same texts; pema_adapters and `tokenizers` in the same batches."""
    from transformer_smaller_training_vocab.token_stats import get_token_stats

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    vocab_size = len(tokenizer)  # a model's config says it: counting a tokenizer's tokens takes a tenth of a second
    batches = [texts[start : start + BATCH_ROWS] for start in range(0, len(texts), BATCH_ROWS)]
    return {
        "tokenizers": lambda: [None for batch in batches if not backend.encode_batch_fast(batch)],
        "tokenizers, ids out": lambda: [[one.ids for one in backend.encode_batch_fast(batch)] for batch in batches][:0],
        "pema_adapters": lambda: scan(tokenizer, dataset, vocab_size),
        "TSTV": lambda: get_token_stats(tokenizer, texts),
    }


def scan(tokenizer: Any, dataset: Dataset, vocab_size: int) -> int:
    return len(scan_text(dataset, Encoder(tokenizer), vocab_size=vocab_size, progress=False).token_ids)


def scan_text_in_child(tokenizer_folder: str, folder: str) -> Generator[None, None, int]:
    """For run_in_child: load everything, scan a small part, then scan all."""
    tokenizer, dataset = AutoTokenizer.from_pretrained(tokenizer_folder), load_from_disk(folder)
    vocab_size = len(tokenizer)
    scan(tokenizer, dataset.select(range(4 * BATCH_ROWS)), vocab_size)
    yield
    return scan(tokenizer, dataset, vocab_size)
