"""Scanning a tokenized data set for the ids in use, beside a bare NumPy bitmap and the closest peer.

- bitmap: `seen[ids] = True` over the very same Arrow buffers. No range check, no columns, no nulls, no picked rows:
  the floor of what a scan can cost in NumPy.
- TSTV: `get_token_stats` of transformer-smaller-training-vocab, which tokenizes text one by one into a Python set.
  On ids it gets a tokenizer that hands them through, so that only its counting is timed, and on text both do all the
  work, with one tokenizer.

    python tools/bench_scan.py [--rows 100000] [--rounds 5] [--json FILE]
"""

import statistics
import tempfile
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from _bench import in_child, median_ratio, paired, parser, table, write_json
from datasets import Dataset, Features, List, Value, disable_progress_bars, load_from_disk

from pema_adapters.reading.text import Encoder
from pema_adapters.scan import scan_text
from pema_adapters.vocabulary import PartialVocabulary

VOCAB_SIZES = (50_265, 901_629)
LENGTH = 128
TEXTS = 4_000
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


def ours(dataset: Dataset, vocab_size: int) -> int:
    return len(PartialVocabulary.from_dataset(dataset, vocab_size=vocab_size))


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
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, LENGTH)).astype(dtype)
    features = Features({"input_ids": List(Value(dtype))})
    Dataset.from_dict({"input_ids": ids}, features=features).save_to_disk(folder)
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


def bench_text(vocab_size: int, rounds: int) -> list[dict[str, Any]]:
    from transformer_smaller_training_vocab.token_stats import get_token_stats

    words = np.random.default_rng(0).integers(0, vocab_size, (TEXTS, LENGTH))
    texts = [" ".join(f"w{word}" for word in text) for text in words.tolist()]
    tokenizer, dataset = word_tokenizer(vocab_size), Dataset.from_dict({"text": texts})
    work = {
        "TSTV, text": lambda: get_token_stats(tokenizer, texts),
        "pema_adapters, text": lambda: scan_text(dataset, Encoder(tokenizer), vocab_size=vocab_size),
    }
    times = paired(work, rounds=rounds)
    data = f"{TEXTS:,} texts of {LENGTH} words"
    return [figures(data, vocab_size, times, name, "TSTV, text") for name in work]


def word_tokenizer(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


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
    return {"anonymous_megabytes": round(memory[name] / MEGABYTE, 1)} if name in memory else {}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=100_000, help=f"rows of {LENGTH} ids (default 100,000)")
    arguments = options.parse_args()
    disable_progress_bars()
    rows = []
    for vocab_size in VOCAB_SIZES:
        for dtype in ("int32", "int64"):
            rows += bench_ids(arguments.rows, vocab_size, dtype, arguments.rounds)
    rows += bench_text(VOCAB_SIZES[0], arguments.rounds)
    header = ["data", "V", "scan", "x reference", "median s", "grown MB (RssAnon)"]
    print(table(header, [cells(found) for found in rows]))
    write_json(arguments.json, {"rounds": arguments.rounds, "scans": rows})


def cells(found: dict[str, Any]) -> list[object]:
    return [
        found["data"],
        f"{found['vocab_size']:,}",
        found["scan"],
        f"{found['ratio']:.2f} x {found['reference']}",
        f"{found['median_seconds']:.3f}",
        found.get("anonymous_megabytes", ""),
    ]


if __name__ == "__main__":
    main()
