"""`pema-scan`: how much of a model's vocabulary a data set uses, before any training."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from pema_adapters.cli._run import run

EPILOG = """\
examples:
  pema-scan --tokenizer FacebookAI/xlm-roberta-base --data train.jsonl dev.jsonl --model FacebookAI/xlm-roberta-base
  pema-scan --tokenizer facebook/xlm-v-base --data nyu-mll/glue:rte --text-column sentence1 --text-column sentence2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `pema-scan`. Returns the exit code: 0 done, 1 refused or failed; argparse exits with 2 on wrong usage."""
    options = _parser().parse_args(argv)
    return run("pema-scan", lambda: _scan(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pema-scan",
        description="Count the rows of a model's embedding matrix that a data set uses.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokenizer", required=True, metavar="T", help="folder or Hub id of the tokenizer")
    add(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="DATASET_OR_FILES",
        help="files (.txt, .json, .jsonl, .csv, .tsv, .parquet, also .gz), a folder of them or from save_to_disk, "
        "or a Hub data set, NAME or NAME:CONFIGURATION",
    )
    add(
        "--text-column",
        action="append",
        default=[],
        metavar="C",
        help="a column to tokenize; repeat for more, each is tokenized by itself (default: all columns of strings)",
    )
    add("--model", metavar="BASE", help="folder or Hub id of the model: gives V, and the parameters saved")
    add("--max-length", type=_positive, metavar="N", help="truncate to N tokens (default: no truncation)")
    add("--json", action="store_true", help="print the figures as JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _scan(options: argparse.Namespace) -> None:
    from pema_adapters.reading.files import load_data
    from pema_adapters.reading.pretrained import embedding_shape, load_tokenizer, tokenizer_rows
    from pema_adapters.reading.text import Encoder
    from pema_adapters.scan import scan_text
    from pema_adapters.vocabulary import PartialVocabulary

    _only_our_errors()
    shape = embedding_shape(options.model) if options.model else None
    tokenizer = load_tokenizer(options.tokenizer)
    vocab_size = shape[0] if shape else tokenizer_rows(tokenizer)
    encoder = Encoder(tokenizer, tuple(options.text_column), options.max_length)
    found = scan_text(load_data(options.data), encoder, vocab_size=vocab_size)
    figures = _figures(options, found, PartialVocabulary(found.token_ids, vocab_size), shape)
    print(json.dumps(figures, indent=2) if options.json else _table(figures))


def _only_our_errors() -> None:
    """What goes wrong is one line of ours: keep the libraries' logs about it off stderr."""
    import datasets
    import transformers

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    transformers.logging.set_verbosity_error()


def _figures(options: argparse.Namespace, found: Any, vocabulary: Any, shape: tuple[int, int] | None) -> dict[str, Any]:
    """What the table and `--json` show; K and V as in the paper."""
    rows = len(vocabulary)
    figures: dict[str, Any] = {
        "tokenizer": options.tokenizer,
        "data": options.data,
        "columns": list(found.columns),
        "vocab_size": vocabulary.vocab_size,
        "tokens": found.tokens,
        "partial_vocab_size": rows,
        "reduction": vocabulary.reduction,
    }
    if shape:
        figures["model"], figures["embedding_dim"] = options.model, shape[1]
        figures["embedding_parameters"] = shape[0] * shape[1]
        figures["partial_embedding_parameters"] = rows * shape[1]
    return figures


LABELS = {
    "tokenizer": "tokenizer",
    "data": "data",
    "columns": "columns",
    "model": "model",
    "vocab_size": "rows of the embedding (V)",
    "tokens": "tokens seen",
    "partial_vocab_size": "distinct tokens (K)",
    "reduction": "reduction",
    "embedding_dim": "embedding width (d)",
    "embedding_parameters": "embedding parameters",
    "partial_embedding_parameters": "  with PEMA",
}


def _table(figures: dict[str, Any]) -> str:
    width = max(map(len, LABELS.values()))
    return "\n".join(f"{LABELS[key].ljust(width)}  {_cell(key, figures[key])}" for key in LABELS if key in figures)


def _cell(key: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.1%}" if key == "reduction" else f"{value:,}" if isinstance(value, int) else str(value)
