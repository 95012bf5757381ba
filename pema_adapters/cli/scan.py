"""`pema-scan`: count the embedding rows that a data set uses, and estimate what PEMA saves, before any training."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema_adapters.cli._common import add_version, run

if TYPE_CHECKING:
    from pema_adapters.cli._scan_metrics import ScanResult

EPILOG = """\
examples:
  pema-scan --tokenizer FacebookAI/xlm-roberta-base --data train.jsonl dev.jsonl --model FacebookAI/xlm-roberta-base
  pema-scan --tokenizer facebook/xlm-v-base --data nyu-mll/glue:rte --text-column sentence1,sentence2 --max-length 128
  pema-scan --tokenizer openai-community/gpt2 --tokenizer google-bert/bert-base-cased --data train.txt --plot growth.png
  pema-scan --tokenizer ./base --model ./base --data train.txt --save train.vocabulary --unused 20
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pema-scan` and return its exit code: 0 done, 1 refused or failed. argparse exits with 2 on wrong usage."""
    parser = _build_parser()
    options = parser.parse_args(argv)
    if options.model and len(options.model) != len(options.tokenizer):
        parser.error(
            f"found {len(options.tokenizer)} --tokenizer and {len(options.model)} --model: give one model for each "
            "tokenizer, in the same order, or none"
        )
    if options.save and len(options.tokenizer) > 1:
        parser.error("--save needs exactly one --tokenizer")
    return run("pema-scan", lambda: _scan(options))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pema-scan",
        description="Count the embedding rows of a model that a data set uses, and the memory saved by training only "
        "these rows with PEMA.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    _add_inputs(parser.add_argument_group("inputs"))
    _add_scanning(parser.add_argument_group("scanning"))
    _add_outputs(parser.add_argument_group("output"))
    return parser


def _add_inputs(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--tokenizer",
        required=True,
        action="append",
        metavar="T",
        help="tokenizer: a folder or Hub id; repeat to compare several",
    )
    add(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="DATASET_OR_FILES",
        help="files (.txt, .json, .jsonl, .csv, .tsv, .parquet, also .gz), folders written by save_to_disk, folders "
        "that contain either at any depth, or a Hub data set, NAME or NAME:CONFIGURATION",
    )
    add(
        "--text-column",
        action="append",
        default=[],
        metavar="C",
        help="column to tokenize, or A,B to tokenize two columns as a pair, as in training; repeat to tokenize more "
        "columns, each by itself (default: all columns of strings)",
    )
    add(
        "--model",
        action="append",
        default=[],
        metavar="BASE",
        help="model: a folder or Hub id; gives V and the memory saved; no weights are read "
        "(with several tokenizers, repeat it for each, in the same order)",
    )


def _add_scanning(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add(
        "--max-length",
        type=_parse_positive,
        metavar="N",
        help="truncate text to N tokens, the longer text of a pair first (default: no truncation)",
    )
    add(
        "--num-proc",
        type=_parse_positive,
        default=1,
        metavar="N",
        help="number of processes that tokenize (for tokenizers in Python; fast ones use all cores by themselves), or "
        "of threads that read tokenized data (default: 1)",
    )
    add(
        "--no-cache",
        action="store_false",
        dest="cache",
        help="neither reuse nor store results, complete or partial (default: cache them in HF_HOME/pema)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code from the repositories or folders of --tokenizer, --model and --data, with your "
        "permissions; read that code first (default: refuse, without a prompt)",
    )


def _add_outputs(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--save", metavar="FILE", help="write the vocabulary to FILE, for PartialVocabulary.load")
    add(
        "--unused",
        nargs="?",
        type=_parse_positive,
        const=0,
        metavar="N",
        help="count the tokens that are never used, and list the first N",
    )
    add("--plot", metavar="FILE.png", help="plot vocabulary size against tokens read (needs matplotlib)")
    add("--json", action="store_true", help="print the results as JSON (with several tokenizers, a list)")


def _parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _scan(options: argparse.Namespace) -> str:
    """Scan, or reuse cached results, and return the text to print; files are written first."""
    from pema_adapters.cli._result_cache import ResultCache

    cache = ResultCache(options)
    metrics = cache.lookup()
    if metrics is None:
        metrics = _compute(options)
        cache.save(metrics)
    return _format(metrics, options.json)


def _compute(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compute the metrics of all tokenizers, and write the requested files."""
    from pema_adapters.cli._scan_metrics import compute_metrics, load_targets, scan_target

    _silence_libraries()
    plot_format = _check_outputs(options)
    results = [scan_target(target, options) for target in load_targets(options)]
    metrics = [compute_metrics(result, options) for result in results]
    _write(results, plot_format, options)
    return metrics


def _check_outputs(options: argparse.Namespace) -> str:
    """Check that the requested files can be written, and return the format of the plot, "" without one."""
    from pema_adapters.analysis.heaps_law import check_figure_path
    from pema_adapters.io.atomic_write import check_replaceable

    if options.save:
        check_replaceable(Path(options.save))
    return check_figure_path(options.plot) if options.plot else ""


def _write(results: Sequence["ScanResult"], plot_format: str, options: argparse.Namespace) -> None:
    from pema_adapters.analysis.heaps_law import render_figure
    from pema_adapters.io.atomic_write import replace_file

    figure = render_figure(plot_format, [result.curve for result in results]) if options.plot else b""
    if options.save:
        results[0].vocabulary.save(options.save)
    if options.plot:
        replace_file(Path(options.plot), figure)


def _format(metrics: Sequence[dict[str, Any]], as_json: bool) -> str:
    from pema_adapters.cli._scan_format import format_metrics

    return json.dumps(metrics[0] if len(metrics) == 1 else metrics, indent=2) if as_json else format_metrics(metrics)


def _silence_libraries() -> None:
    """Silence the libraries' logs, since any failure is one line of ours; and their progress bars, off a terminal."""
    import datasets
    import transformers

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    # bitsandbytes warns on machines without GPU, huggingface_hub logs each try without network
    for library in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
