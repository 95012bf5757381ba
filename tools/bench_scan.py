"""Scanning a tokenized data set for the ids in use, beside a bare NumPy bitmap and the closest peer.

- bitmap: `seen[ids] = True` over the very same Arrow buffers. No range check, no columns, no nulls, no picked rows:
  the floor of what a scan can cost in NumPy.
- TSTV: `get_token_stats` of transformer-smaller-training-vocab, which tokenizes text one by one into a Python set.
  On ids it gets a tokenizer that hands them through, so that only its counting is timed, and on text both do all the
  work, with one tokenizer.
- tokenizers: on text, `encode_batch_fast` alone, in the same batches, its result thrown away or its ids taken out.
- num_proc=2 beside one thread, on ids that no cache holds.

    python tools/bench_scan.py [--parts ids workers text] [--rounds 5] [--json FILE] \\
        [--tokenizer T --text FILE ...]      # default: Python's standard library, and a tokenizer trained on it
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pyarrow as pa
from _bench import in_child, median_ratio, paired, parser, table, write_json
from _scan_text import contestants, texts_of, tokenizer_of
from _scan_text import measured as measured_text
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_from_disk

from pema_adapters.vocabulary import PartialVocabulary

VOCAB_SIZES = (50_265, 901_629)
LENGTH = 128
SHARD = 12_800_000  # ids in a file
MORE = 4  # times the texts: memory should not care
PARTS = ("ids", "workers", "text")
MEGABYTE = 1e6


class HandsThrough:
    """A tokenizer for what is tokenized already."""

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

    return len(get_token_stats(HandsThrough(), dataset["input_ids"]))


def measured(contestant: Callable[[Dataset, int], int], folder: str, vocab_size: int) -> Generator[None, None, int]:
    """For a child process: load everything and work once on a little, then measure."""
    dataset = load_from_disk(folder)
    contestant(dataset.select(range(10)), vocab_size)
    yield
    return contestant(dataset, vocab_size)


def make_dataset(folder: str, rows: int, vocab_size: int, dtype: str) -> Dataset:
    """Uniform ids, the hardest case for caches, written and memory-mapped as datasets do."""
    ids = np.random.default_rng(0).integers(0, vocab_size, rows * LENGTH, dtype=dtype)
    ends = np.arange(rows + 1, dtype=np.int32) * LENGTH
    Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(ends, ids)})).save_to_disk(folder)
    return load_from_disk(folder)


def bench_ids(rows: int, vocab_size: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder, rows, vocab_size, dtype)
        shuffled = dataset.shuffle(seed=0, keep_in_memory=True)
        half = shuffled.select(range(rows // 2), keep_in_memory=True)
        work = {
            "bitmap": lambda: bitmap(dataset, vocab_size),
            "pema_adapters": lambda: ours(dataset, vocab_size),
            "pema_adapters, shuffled": lambda: ours(shuffled, vocab_size),
            "pema_adapters, random half": lambda: ours(half, vocab_size),
        }
        children = {"bitmap": bitmap, "pema_adapters": ours}
        if dtype == "int32":  # its time lies in Python's lists and sets: once is enough
            work["TSTV, ids"] = lambda: tstv(dataset, vocab_size)
            children["TSTV, ids"] = tstv
        if work["bitmap"]() != work["pema_adapters"]():
            raise SystemExit("the scans disagree")
        times = paired(work, rounds=rounds)
        memory = {name: in_child(measured, child, folder, vocab_size).grown for name, child in children.items()}
    data = f"{rows * LENGTH / 1e6:.1f}M {dtype} ids"
    return [figures(data, vocab_size, times, name, "bitmap") | grown(memory, name) for name in work]


def bench_workers(id_count: int, rounds: int) -> list[dict[str, Any]]:
    """One thread and two, over data that are written in shards, and larger than any cache."""
    vocab_size, rows = VOCAB_SIZES[0], SHARD // LENGTH
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{shard}" for shard in range(-(-id_count // SHARD))]
        dataset = concatenate_datasets([make_dataset(name, rows, vocab_size, "int32") for name in names])
        work = {
            "pema_adapters": lambda: ours(dataset, vocab_size),
            "pema_adapters, num_proc=2": lambda: ours(dataset, vocab_size, num_proc=2),
        }
        times = paired(work, rounds=rounds)
    data = f"{len(names) * SHARD / 1e6:.0f}M int32 ids"
    return [figures(data, vocab_size, times, name, "pema_adapters") for name in work]


def bench_text(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    texts = texts_of(arguments.text, arguments.texts)
    tokenizer = tokenizer_of(arguments.tokenizer, texts)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(f"{folder}/tokenizer")
        for name, many in (("texts", texts), ("more", texts * MORE)):
            Dataset.from_dict({"text": many}).save_to_disk(f"{folder}/{name}")
        times = paired(contestants(tokenizer, texts, load_from_disk(f"{folder}/texts")), rounds=arguments.rounds)
        memory = [in_child(measured_text, f"{folder}/tokenizer", f"{folder}/{name}") for name in ("texts", "more")]
    data, vocab_size = f"{len(texts):,} texts", len(tokenizer)
    rows = [figures(data, vocab_size, times, name, "tokenizers") for name in times]
    rows.append(figures(data, vocab_size, times, "TSTV", "pema_adapters"))
    more = {"data": f"{len(texts) * MORE:,} texts", "vocab_size": vocab_size, "scan": "pema_adapters"}
    rows[list(times).index("pema_adapters")] |= megabytes(memory[0].grown)
    return [*rows, more | {"median_seconds": round(memory[1].seconds, 4)} | megabytes(memory[1].grown)]


def figures(data: str, vocab_size: int, times: Any, name: str, reference: str) -> dict[str, Any]:
    return {
        "data": data,
        "vocab_size": vocab_size,
        "scan": name,
        "reference": reference,
        "ratio": round(median_ratio(times, name, reference), 3),
        "median_seconds": round(statistics.median(times[name]), 4),
    }


def grown(memory: dict[str, int], name: str) -> dict[str, float]:
    return megabytes(memory[name]) if name in memory else {}


def megabytes(size: int) -> dict[str, float]:
    return {"anonymous_megabytes": round(size / MEGABYTE, 1)}


def main() -> None:
    arguments = options().parse_args()
    disable_progress_bars()
    rows = []
    for vocab_size in VOCAB_SIZES if "ids" in arguments.parts else ():
        for dtype in ("int32", "int64"):
            rows += bench_ids(arguments.rows, vocab_size, dtype, arguments.rounds)
    if "workers" in arguments.parts:
        rows += bench_workers(arguments.ids, arguments.rounds)
    if "text" in arguments.parts:
        rows += bench_text(arguments)
    header = ["data", "V", "scan", "x reference", "median s", "grown MB (RssAnon)"]
    print(table(header, [cells(found) for found in rows]))
    write_json(arguments.json, {"rounds": arguments.rounds, "scans": rows})


def options() -> argparse.ArgumentParser:
    found = parser(__doc__)
    add = found.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--rows", type=int, default=100_000, help=f"rows of {LENGTH} ids (default 100,000)")
    add(
        "--ids",
        type=int,
        default=200_000_000,
        help="ids for one thread and two: 4 bytes each on the disk (default 2e8)",
    )
    add("--texts", type=int, default=20_000, help="texts to tokenize (default 20,000)")
    add("--text", nargs="+", default=[], metavar="FILE", help="data files of text (default: Python's standard library)")
    add("--tokenizer", metavar="T", help="folder or Hub id (default: trained on the text)")
    return found


def cells(found: dict[str, Any]) -> list[object]:
    return [
        found["data"],
        f"{found['vocab_size']:,}",
        found["scan"],
        f"{found['ratio']:.2f} x {found['reference']}" if "ratio" in found else "",
        f"{found['median_seconds']:.3f}",
        found.get("anonymous_megabytes", ""),
    ]


if __name__ == "__main__":
    main()
