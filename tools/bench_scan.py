"""Scanning a tokenized data set for the ids in use, beside a bare NumPy bitmap and the closest peer.

- bitmap: `seen[ids] = True` over the very same Arrow buffers. No range check, no columns, no nulls, no picked rows:
  the floor of what a scan can cost in NumPy.
- TSTV: `get_token_stats` of transformer-smaller-training-vocab, which tokenizes text one by one into a Python set.
  On ids it gets a tokenizer that hands them through, so that only its counting is timed, and on text both do all the
  work, with one tokenizer.
- tokenizers: on text, `encode_batch_fast` alone, in the same batches, its result thrown away or its ids taken out.
- num_proc=2 beside one thread, on ids that no cache holds.

    python tools/bench_scan.py [--parts ids workers text] [--rounds 5] [--json FILE] [--save] \\
        [--tokenizer T --text FILE ...]      # default: Python's standard library, and a tokenizer trained on it
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_from_disk

from harness.child import run_in_child
from harness.command_line import make_parser
from harness.results import write_results
from harness.scan_text import load_or_train_tokenizer, read_texts, scan_text_in_child, text_contestants
from harness.tables import format_table
from harness.timing import format_ratio, round_ratios, time_paired
from pema_adapters.vocabulary import PartialVocabulary

VOCAB_SIZES = (50_265, 901_629)
LENGTH = 128
SHARD = 12_800_000  # ids in a file
MORE = 4  # times the texts, for memory that does not grow with them
PARTS = ("ids", "workers", "text")
MEGABYTE = 1e6
OURS = "pema_adapters"
Scan = Callable[[Dataset, int], int]


class IdentityTokenizer:
    """A tokenizer for ids: returns them as they are."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 - the attribute that TSTV reads

    def __call__(self, text: list[int], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": text}


def bitmap(dataset: Dataset, vocab_size: int) -> int:
    seen = np.zeros(vocab_size, dtype=np.bool_)
    for chunk in dataset.data.column("input_ids").chunks:
        seen[chunk.flatten().to_numpy()] = True
    return int(np.count_nonzero(seen))


def ours(dataset: Dataset, vocab_size: int, num_proc: int = 1) -> int:
    return len(PartialVocabulary.from_dataset(dataset, vocab_size=vocab_size, num_proc=num_proc))


def tstv(dataset: Dataset, vocab_size: int) -> int:
    from transformer_smaller_training_vocab.token_stats import get_token_stats

    return len(get_token_stats(IdentityTokenizer(), dataset["input_ids"]))


def scan_in_child(contestant: Scan, folder: str, vocab_size: int) -> Generator[None, None, int]:
    """For run_in_child: load everything, scan a small part, then scan all."""
    dataset = load_from_disk(folder)
    contestant(dataset.select(range(10)), vocab_size)
    yield
    return contestant(dataset, vocab_size)


def make_dataset(folder: str, rows: int, vocab_size: int, dtype: str) -> Dataset:
    """Write uniform ids, the hardest case for caches, and map them as datasets does."""
    ids = np.random.default_rng(0).integers(0, vocab_size, rows * LENGTH, dtype=dtype)
    ends = np.arange(rows + 1, dtype=np.int32) * LENGTH
    Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(ends, ids)})).save_to_disk(folder)
    return load_from_disk(folder)


def bench_ids(rows: int, vocab_size: int, dtype: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder, rows, vocab_size, dtype)
        shuffled = dataset.shuffle(seed=0, keep_in_memory=True)
        half = shuffled.select(range(rows // 2), keep_in_memory=True)
        work = {
            "bitmap": lambda: bitmap(dataset, vocab_size),
            OURS: lambda: ours(dataset, vocab_size),
            f"{OURS}, shuffled": lambda: ours(shuffled, vocab_size),
            f"{OURS}, random half": lambda: ours(half, vocab_size),
        }
        children = {"bitmap": bitmap, OURS: ours}
        if dtype == "int32":  # its time lies in Python's lists and sets: once is enough
            work["TSTV, ids"] = lambda: tstv(dataset, vocab_size)
            children["TSTV, ids"] = tstv
        if work["bitmap"]() != work[OURS]():
            raise SystemExit("the scans disagree")
        times = time_paired(work, rounds=rounds)
        memory = {name: run_in_child(scan_in_child, one, folder, vocab_size).grown for name, one in children.items()}
    return describe(f"{rows * LENGTH / 1e6:.1f}M {dtype} ids", vocab_size, "bitmap", times, memory)


def bench_workers(id_count: int, rounds: int) -> dict[str, Any]:
    """Scan data in shards, larger than any cache, with one thread and with two."""
    vocab_size, rows = VOCAB_SIZES[0], SHARD // LENGTH
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{shard}" for shard in range(-(-id_count // SHARD))]
        dataset = concatenate_datasets([make_dataset(name, rows, vocab_size, "int32") for name in names])
        work = {
            OURS: lambda: ours(dataset, vocab_size),
            f"{OURS}, num_proc=2": lambda: ours(dataset, vocab_size, num_proc=2),
        }
        times = time_paired(work, rounds=rounds)
    return describe(f"{len(names) * SHARD / 1e6:.0f}M int32 ids", vocab_size, OURS, times, {})


def bench_text(options: argparse.Namespace) -> list[dict[str, Any]]:
    texts = read_texts(options.text, options.texts)
    tokenizer = load_or_train_tokenizer(options.tokenizer, texts)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(f"{folder}/tokenizer")
        for name, many in (("texts", texts), ("more", texts * MORE)):
            Dataset.from_dict({"text": many}).save_to_disk(f"{folder}/{name}")
        contestants = text_contestants(tokenizer, texts, load_from_disk(f"{folder}/texts"))
        times = time_paired(contestants, rounds=options.rounds)
        few = run_in_child(scan_text_in_child, f"{folder}/tokenizer", f"{folder}/texts")
        many = run_in_child(scan_text_in_child, f"{folder}/tokenizer", f"{folder}/more")
    size = len(tokenizer)
    return [
        describe(f"{len(texts):,} texts", size, "tokenizers", times, {OURS: few.grown}),
        describe(f"{len(texts) * MORE:,} texts", size, OURS, {OURS: [many.seconds]}, {OURS: many.grown}),
    ]


def describe(data: str, vocab_size: int, reference: str, times: Any, memory: dict[str, int]) -> dict[str, Any]:
    """Return the figures of one data set."""
    return {"data": data, "vocab_size": vocab_size, "reference": reference, "seconds": times, "anonymous_bytes": memory}


def render(figures: dict[str, Any]) -> str:
    header = ["data", "V", "scan", "median s", "/ reference, median (range)", f"/ {OURS}", "grown MB (RssAnon)"]
    return format_table(header, [_row(found, name) for found in figures["scans"] for name in found["seconds"]])


def _row(found: dict[str, Any], name: str) -> list[str]:
    times, reference, grown = found["seconds"], found["reference"], found["anonymous_bytes"].get(name)
    ratios = [
        "" if name == other or len(times) == 1 else format_ratio(round_ratios(times, name, other))
        for other in (reference, OURS)
    ]
    return [
        found["data"], f"{found['vocab_size']:,}", name, f"{statistics.median(times[name]):.3f}",
        f"{ratios[0]} x {reference}" if ratios[0] else "", ratios[1] if reference != OURS else "",
        "" if grown is None else f"{grown / MEGABYTE:.1f}",
    ]  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    scans = []
    for vocab_size in VOCAB_SIZES if "ids" in options.parts else ():
        for dtype in ("int32", "int64"):
            scans.append(bench_ids(options.rows, vocab_size, dtype, options.rounds))
    if "workers" in options.parts:
        scans.append(bench_workers(options.ids, options.rounds))
    if "text" in options.parts:
        scans += bench_text(options)
    return {"scans": scans}


def main() -> None:
    options = parse()
    disable_progress_bars()
    figures = measure(options)
    print(render(figures))
    write_results(options, figures)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=5)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--rows", type=int, default=100_000, help=f"rows of {LENGTH} ids (default 100,000)")
    add("--ids", type=int, default=200_000_000, help="ids for one thread and two, 4 bytes each (default 2e8)")
    add("--texts", type=int, default=20_000, help="texts to tokenize (default 20,000)")
    add("--text", nargs="+", default=[], metavar="FILE", help="data files of text (default: Python's standard library)")
    add("--tokenizer", metavar="T", help="folder or Hub id (default: trained on the text)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
