"""Scan hundreds of damaged data files: each is refused in one line that names it, or scanned right.

    python tools/fuzz_arrow.py [--mutations 1000] [--seed 0] [--only NUMBER ...] [--limit SECONDS] [--json FILE]

Small data sets with ids in columns of several kinds, as Arrow files that `save_to_disk` writes and as Parquet, one file
of which is cut, or has bits, bytes, words or stretches changed. The same seed gives the same mutations. Each is read in
three ways: `PartialVocabulary.from_dataset` on the loaded data set and on a stream of it, and `pema-scan`. The ids must
be those of the undamaged file. Where the damage lies within the ids, nulls and lengths of rows, which no checksum
guards, in Parquet, or in a stream, which does not tell of its files, they must be those that Arrow reads. Exits with 1
if a case escaped: another exception than the package's own, a crash, a hang, a wrong vocabulary, a message of several
lines.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from fuzz.arrow_files import Source, V, damage, is_unguarded, read_by_arrow, write_sources
from fuzz.tally import format_counts
from harness.command_line import make_parser
from harness.results import write_results

KINDS = ("refused", "scanned", "escaped")
READERS = ("from_dataset", "stream", "pema-scan")


def scan(source: Source, reader: str, folder: Path) -> frozenset[int]:
    """Return the ids that pema_adapters finds, or raise its error."""
    import datasets

    from pema_adapters import PartialVocabulary
    from pema_adapters.errors import FormatError, PemaError

    if reader == "pema-scan":
        return scan_by_command(source, folder)
    try:
        if source.file.suffix == ".parquet":
            options = {"streaming": True} if reader == "stream" else {"cache_dir": str(folder / "cache")}
            data = datasets.load_dataset("parquet", data_files=[str(source.file)], split="train", **options)
        else:
            data = datasets.load_from_disk(str(source.folder))
            data = data.to_iterable_dataset() if reader == "stream" else data
    except Exception as error:  # the caller's own line, not ours
        raise FormatError(f"not loaded: {type(error).__name__}") from error
    finally:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    try:
        return frozenset(PartialVocabulary.from_dataset(data, vocab_size=V))
    except PemaError as error:
        if "input_ids" not in str(error) and str(source.folder) not in str(error) and "data: " not in str(error):
            raise AssertionError(f"names neither the column nor the file: {error}") from error
        raise


def scan_by_command(source: Source, folder: Path) -> frozenset[int]:
    from pema_adapters import PartialVocabulary
    from pema_adapters.cli.scan import main
    from pema_adapters.errors import FormatError

    saved, err = folder / "x.vocabulary", io.StringIO()
    arguments = ["--tokenizer", str(folder / "tok"), "--data", str(source.folder), "--save", str(saved), "--no-cache"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = main(arguments)
    if code == 0:
        return frozenset(PartialVocabulary.load(saved))
    text = err.getvalue()
    if code != 1 or text.count("\n") != 1 or str(source.folder) not in text:
        raise AssertionError(f"exit code {code}, and on stderr: {text!r}")
    raise FormatError(text)


def judge(source: Source, content: bytes, reader: str, folder: Path) -> tuple[str, str]:
    """Return kind and text of an outcome."""
    from pema_adapters.errors import PemaError

    source.file.unlink()  # a map of the last case may be open
    source.file.write_bytes(content)
    try:
        found = scan(source, reader, folder)
        is_excused = is_unguarded(source, content) or reader == "stream" or source.file.suffix == ".parquet"
        if found == source.ids or (is_excused and found == read_by_arrow(source)):
            return "scanned", ""
        return "escaped", f"a wrong vocabulary: {sorted(found ^ source.ids)[:9]} more or less"
    except PemaError as error:
        return ("refused" if content != source.content and "\n" not in str(error) else "escaped"), str(error)
    except BaseException:
        return "escaped", traceback.format_exc()


def work(pipe: Connection, folder: Path, seed: int) -> None:
    """In a process of its own, which a case may kill: answer numbers with outcomes."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(folder / "hf"), OMP_NUM_THREADS="1")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    words = {f"w{i}": i for i in range(V)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(
        folder / "tok"
    )
    sources = write_sources(folder / str(os.getpid()))
    while (number := pipe.recv()) is not None:
        random = Random(f"{seed} {number}")
        source, reader = sources[number % len(sources)], READERS[number // len(sources) % len(READERS)]
        name, content = (
            damage(source.content, random) if number >= len(sources) * len(READERS) else ("none", source.content)
        )
        pipe.send((f"{source.name.split(',')[0]}, {reader}", f"{number}: {source.name}, {reader}, {name}"))
        pipe.send(judge(source, content, reader, folder))


class Worker:
    """The process of the cases; restarted after a case that killed it."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.folder, self.options.seed), daemon=True)
        self.process.start()
        theirs.close()

    def judge(self, number: int) -> tuple[str, str, tuple[str, str]]:
        self.pipe.send(number)
        family, name = self.pipe.recv()
        try:
            if self.pipe.poll(self.options.limit):
                return family, name, self.pipe.recv()
            text = f"hangs: no answer after {self.options.limit} s"
        except EOFError:
            self.process.join()
            text = f"the process died with exit code {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.start()
        return family, name, ("escaped", text)


def render(figures: dict[str, Any]) -> str:
    counts = figures["counts"]
    count = sum(sum(found.values()) for found in counts.values())
    total = f"{count:,} cases (seed {figures['seed']}), {len(figures['escapes'])} escaped"
    return f"{format_counts(counts, KINDS)}\n\n{total}"


def main() -> int:
    options = _parser().parse_args()
    counts: dict[str, Counter[str]] = {}
    escapes = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        worker = Worker(Path(folder), options)
        for number in options.only or range(options.mutations):
            family, name, (kind, text) = worker.judge(number)
            counts.setdefault(family, Counter())[kind] += 1
            if kind == "escaped" or options.only:
                print(f"{kind.upper()} {name}\n    {text.strip()}", flush=True)
            escapes += [{"name": name, "what": text}] if kind == "escaped" else []
        worker.pipe.send(None)
        worker.process.join()
    figures = {"seed": options.seed, "counts": counts, "escapes": escapes}
    print(render(figures))
    write_results(options, figures)
    return 1 if escapes else 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--mutations", type=int, default=1_000, help="how many cases (default 1,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="only these cases, with their outcome")
    parser.add_argument("--limit", type=float, default=60, metavar="SECONDS", help="for one case (default 60)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
