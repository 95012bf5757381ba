"""GLUE and XNLI as tab-separated files, and which rows of an embedding they use.

    GLUE/CoLA/{train,validation,test}.tsv[.gz]      a header; sentence, or two columns of text; label
    XNLI/en/{train,validation,test}.tsv[.gz]        the same, a folder a language

No quoting. What stands behind a split's name does not matter (validation_matched.tsv.gz is one of validation).
"""

import gzip
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from operator import or_
from pathlib import Path
from typing import Any

from pema_adapters import PartialVocabulary
from pema_adapters.hub.pretrained import load_tokenizer

SPLITS = ("train", "validation", "test")
NO_TEXT = {"label", "idx", "index"}
LENGTH = 128
BATCH = 2_000  # rows tokenized at a time

Texts = tuple[str, ...]  # a sentence, or a pair


@dataclass
class Usage:
    """The rows that data use: each pair of tokenizer and task is scanned once, and cached.

    Args:
        tokenizers: a folder of tokenizer folders; None: there are none.
        folders: GLUE's, XNLI's, by which a task is found; None where there is none.
    """

    tokenizers: Path | None
    folders: dict[str, Path | None]
    scanned: dict[tuple[str, str, str], PartialVocabulary] = field(default_factory=dict)
    rows: dict[tuple[str, str], int] = field(default_factory=dict)  # of each task's splits together
    missing: dict[str, None] = field(default_factory=dict)  # what was asked for and is not there, in order

    def of(self, tokenizer: str, vocab_size: int, benchmark: str, tasks: Texts) -> PartialVocabulary | None:
        """Return the rows that some tasks use together; None where the tokenizer or a task is missing."""
        files = {task: self.files(benchmark, task) for task in tasks}
        missing = [f"{benchmark} {task}" for task in tasks if not files[task]]
        if not (self.tokenizers and (self.tokenizers / tokenizer).is_dir()):
            missing.insert(0, f"tokenizer {tokenizer}")
        self.missing.update(dict.fromkeys(missing))
        if missing:
            return None
        for task in tasks:
            if (benchmark, task) not in self.rows:
                self.rows[benchmark, task] = sum(1 for file in files[task] for _ in texts(file))
            if (tokenizer, benchmark, task) not in self.scanned:
                self.scanned[tokenizer, benchmark, task] = self.scan(tokenizer, vocab_size, task, files[task])
        return reduce(or_, (self.scanned[tokenizer, benchmark, task] for task in tasks))

    def scan(self, tokenizer: str, vocab_size: int, task: str, files: list[Path]) -> PartialVocabulary:
        start = time.perf_counter()
        rows = encode_batches(files, load_tokenizer(str(self.tokenizers / tokenizer)))
        found = PartialVocabulary.from_dataset(rows, vocab_size=vocab_size, progress=False)
        print(f"{tokenizer}, {task}: {found!r}, {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        return found

    def files(self, benchmark: str, task: str) -> list[Path]:
        """Return the files of all splits of a task; none where a split is missing."""
        folder = self.folders.get(benchmark)
        there = [part for part in sorted(folder.iterdir()) if _plain(part.name) == _plain(task)] if folder else []
        files = [sorted(there[0].glob(f"{split}*.tsv*")) if there else [] for split in SPLITS]
        return [file for split in files for file in split] if all(files) else []


def encode_batches(files: list[Path], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield batches of ids as the paper counts them: special tokens, the pad token, pairs, 128 tokens at most."""
    options = {"truncation": True, "max_length": LENGTH, "return_attention_mask": False, "return_token_type_ids": False}
    yield {"input_ids": [tokenizer.pad_token_id]}
    for file in files:
        rows = texts(file)
        while batch := list(islice(rows, BATCH)):
            yield {"input_ids": tokenizer(*map(list, zip(*batch, strict=True)), **options)["input_ids"]}


def texts(file: Path) -> Iterator[Texts]:
    """Yield the texts of each row: one or two.

    Raises:
        SystemExit: another number of text columns, or a row that does not fit the header.
    """
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8", newline="\n") as lines:
        header = next(lines, "").rstrip("\r\n").split("\t")
        columns = [position for position, name in enumerate(header) if name not in NO_TEXT]
        if len(columns) not in {1, 2}:
            raise SystemExit(f"{file}: found the columns {', '.join(header)}, expected one or two of text, and label")
        for number, line in enumerate(lines, 2):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != len(header):
                raise SystemExit(f"{file}, line {number}: {len(cells)} columns, but {len(header)} in the header")
            yield tuple(cells[position] for position in columns)


def _plain(name: str) -> str:
    """Return a name without case and punctuation: SST-2, sst2 and SST_2 are one task."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
