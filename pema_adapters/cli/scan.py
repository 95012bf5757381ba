"""`pema-scan`: how much of a model's vocabulary a data set uses, and what PEMA would save, before any training."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema_adapters.cli._common import add_version, run

if TYPE_CHECKING:
    from pema_adapters.cli._scan_report import ScanResult

EPILOG = """\
examples:
  pema-scan --tokenizer FacebookAI/xlm-roberta-base --data train.jsonl dev.jsonl --model FacebookAI/xlm-roberta-base
  pema-scan --tokenizer facebook/xlm-v-base --data nyu-mll/glue:rte --text-column sentence1,sentence2 --max-length 128
  pema-scan --tokenizer openai-community/gpt2 --tokenizer google-bert/bert-base-cased --data train.txt --plot growth.png
  pema-scan --tokenizer ./base --model ./base --data train.txt --save train.vocabulary --unused 20
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pema-scan`. Returns the exit code: 0 done, 1 refused or failed; argparse exits with 2 on wrong usage."""
    parser = _build_parser()
    options = parser.parse_args(argv)
    if options.model and len(options.model) != len(options.tokenizer):
        parser.error(
            f"found {len(options.tokenizer)} --tokenizer and {len(options.model)} --model: give each tokenizer its "
            "model, in the same order, or no models"
        )
    if options.save and len(options.tokenizer) > 1:
        parser.error("--save writes the vocabulary of one --tokenizer")
    return run("pema-scan", lambda: _scan(options))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pema-scan",
        description="Count the rows of a model's embedding matrix that a data set uses, and what training only these "
        "saves in memory.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    add = parser.add_argument
    add(
        "--tokenizer",
        required=True,
        action="append",
        metavar="T",
        help="folder or Hub id of the tokenizer; repeat to compare several",
    )
    add(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="DATASET_OR_FILES",
        help="files (.txt, .json, .jsonl, .csv, .tsv, .parquet, also .gz), folders that save_to_disk wrote, folders "
        "of these at any depth, or a Hub data set, NAME or NAME:CONFIGURATION",
    )
    add(
        "--text-column",
        action="append",
        default=[],
        metavar="C",
        help="a column to tokenize, or A,B: columns A and B of a row as a pair, as in training; repeat for more, "
        "each is tokenized by itself (default: all columns of strings)",
    )
    add(
        "--model",
        action="append",
        default=[],
        metavar="BASE",
        help="folder or Hub id of the model: gives V, and the memory saved; no weights are read "
        "(with several tokenizers: one for each, in the same order)",
    )
    add(
        "--max-length",
        type=_parse_positive,
        metavar="N",
        help="truncate text to N tokens, of a pair the longer one first (default: no truncation)",
    )
    add(
        "--num-proc",
        type=_parse_positive,
        default=1,
        metavar="N",
        help="N processes tokenize (for tokenizers in Python: fast ones use all cores by themselves); of tokenized "
        "data, N threads read (default 1)",
    )
    add(
        "--no-cache",
        action="store_false",
        dest="cache",
        help="scan anew what was scanned before, even in part, and remember nothing (default: in HF_HOME/pema)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code from the repositories or folders of --tokenizer, --model and --data, with your "
        "permissions; read it first (default: refuse what needs it, without asking)",
    )
    add("--save", metavar="FILE", help="write the vocabulary, for PartialVocabulary.load")
    add(
        "--unused",
        nargs="?",
        type=_parse_positive,
        const=0,
        metavar="N",
        help="count the tokens that are never used, and show the first N",
    )
    add("--plot", metavar="FILE.png", help="draw how the vocabulary grows with the tokens read (needs matplotlib)")
    add("--json", action="store_true", help="print the figures as JSON (with several tokenizers: a list)")
    return parser


def _parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _scan(options: argparse.Namespace) -> str:
    """Scan, or reuse earlier results; returns the text to print, once all is checked, scanned and written."""
    from pema_adapters.cli._result_cache import ResultCache

    answers = ResultCache(options)
    figures = answers.lookup()
    if figures is None:
        figures = _compute(options)
        answers.save(figures)
    return _format(figures, options.json)


def _compute(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of all tokenizers; files that were asked for are written."""
    from pema_adapters.cli._scan_report import compute_metrics, load_targets, scan_target

    _silence_libraries()
    figure_format = _check_outputs(options)
    found = [scan_target(subject, options) for subject in load_targets(options)]
    figures = [compute_metrics(one, options) for one in found]
    _write(found, figure_format, options)
    return figures


def _check_outputs(options: argparse.Namespace) -> str:
    """The format of the figure, if there is to be one; refused where a file could not be written."""
    from pema_adapters.analysis.heaps_law import check_figure_path
    from pema_adapters.io.atomic_write import check_replaceable

    if options.save:
        check_replaceable(Path(options.save))
    return check_figure_path(options.plot) if options.plot else ""


def _write(found: Sequence["ScanResult"], figure_format: str, options: argparse.Namespace) -> None:
    from pema_adapters.analysis.heaps_law import render_figure
    from pema_adapters.io.atomic_write import replace_file

    figure = render_figure(figure_format, [one.curve for one in found]) if options.plot else b""
    if options.save:
        found[0].vocabulary.save(options.save)
    if options.plot:
        replace_file(Path(options.plot), figure)


def _format(figures: Sequence[dict[str, Any]], as_json: bool) -> str:
    from pema_adapters.cli._scan_format import format_metrics

    return json.dumps(figures[0] if len(figures) == 1 else figures, indent=2) if as_json else format_metrics(figures)


def _silence_libraries() -> None:
    """What goes wrong is one line of ours: keep the libraries' logs off stderr; and their bars, where nobody looks."""
    import datasets
    import transformers

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    # adapters loads the one, which warns on machines without GPU; the other has lines for each try without network
    for library in ("bitsandbytes", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
