"""Compute the metrics of `pema-scan`: K and V as in the paper, and what follows from them."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from pema_adapters.analysis.heaps_law import Curve, fit_heaps_law
from pema_adapters.analysis.memory_report import OPTIMIZERS, build_on_meta, memory_report
from pema_adapters.errors import PemaError
from pema_adapters.hub.pretrained import count_tokenizer_rows, load_tokenizer, read_embedding_shape
from pema_adapters.scanning.cache.cached_scan import DataSource, format_cache_note, scan_with_cache
from pema_adapters.scanning.scanner import Scan
from pema_adapters.scanning.text_columns import Encoder
from pema_adapters.vocabulary import PartialVocabulary


@dataclass(frozen=True)
class ScanTarget:
    """A tokenizer to scan with, and optionally its model.

    Attributes:
        name: Folder or Hub id of the tokenizer.
        tokenizer: The tokenizer.
        model: Folder or Hub id of the model, None without one.
        shape: (V, d) of the model.
    """

    name: str
    tokenizer: Any
    model: str | None
    shape: tuple[int, int] | None

    @property
    def vocab_size(self) -> int:
        """V of the model, or else as far as the tokenizer can tell."""
        return self.shape[0] if self.shape else count_tokenizer_rows(self.tokenizer)


@dataclass(frozen=True)
class ScanResult:
    """The scan of all the data with one tokenizer.

    Attributes:
        target: What was scanned with.
        scan: The result.
        vocabulary: The ids in use.
        cache: The folder that the scan was read from, "" if the data were read.
    """

    target: ScanTarget
    scan: Scan
    vocabulary: PartialVocabulary
    cache: str

    @property
    def curve(self) -> Curve:
        """Vocabulary size by tokens read, for the plot."""
        return Curve(self.target.name, self.scan.growth, self.vocabulary.vocab_size)

    def iterate_unused(self) -> Iterator[tuple[int, str | None]]:
        """Yield (id, token) that training never uses, by increasing id; the token is None for a row without one.

        The pad token counts as used, since collators insert it.
        """
        used = {*self.vocabulary, self.target.tokenizer.pad_token_id}
        for token_id in range(self.vocabulary.vocab_size):
            if token_id not in used:
                yield token_id, _decode_token(self.target.tokenizer, token_id)


def load_targets(options: argparse.Namespace) -> list[ScanTarget]:
    """Load all tokenizers and configs."""
    models = options.model or [None] * len(options.tokenizer)
    trusted = options.trust_remote_code
    shapes = [read_embedding_shape(model, trusted) if model else None for model in models]
    tokenizers = [load_tokenizer(name, trusted) for name in options.tokenizer]
    return [ScanTarget(*one) for one in zip(options.tokenizer, tokenizers, models, shapes, strict=True)]


def scan_target(target: ScanTarget, options: argparse.Namespace) -> ScanResult:
    """Scan all the data with one tokenizer, or read the result from the cache."""
    encoder = Encoder(target.tokenizer, tuple(options.text_column), options.max_length)
    data, how = (
        DataSource(tuple(options.data), options.trust_remote_code),
        {"num_proc": options.num_proc, "use_cache": options.cache},
    )
    scan, cache = scan_with_cache(data, encoder, target.vocab_size, **how)
    return ScanResult(target, scan, PartialVocabulary(scan.token_ids, target.vocab_size), cache)


def compute_metrics(result: ScanResult, options: argparse.Namespace) -> dict[str, Any]:
    """Return the metrics that the table and `--json` show, ready for JSON."""
    vocabulary, law = result.vocabulary, fit_heaps_law(result.scan.growth)
    metrics: dict[str, Any] = {
        "tokenizer": result.target.name,
        "data": options.data,
        "columns": list(result.scan.columns),
        "vocab_size": vocabulary.vocab_size,
        "tokens": result.scan.tokens,
        "partial_vocab_size": len(vocabulary),
        "reduction": vocabulary.reduction,
        "growth": [list(point) for point in result.scan.growth],
        "heaps_law": None if law is None else asdict(law),
        "from_cache": bool(result.cache),
        "notes": [*result.scan.notes, *([format_cache_note(result.cache)] if result.cache else [])],
    }
    if options.unused is not None:
        pad = result.target.tokenizer.pad_token_id
        is_added = pad is not None and pad < vocabulary.vocab_size and pad not in vocabulary
        metrics["unused"] = vocabulary.vocab_size - len(vocabulary) - is_added
        metrics["unused_tokens"] = [list(token) for token in islice(result.iterate_unused(), options.unused)]
    return {**metrics, **_compute_model_metrics(result, options.trust_remote_code)}


def _compute_model_metrics(result: ScanResult, trust_remote_code: bool) -> dict[str, Any]:
    """Return the metrics of the embedding, from the config, and of the whole model if it can be built."""
    model, shape = result.target.model, result.target.shape
    if model is None or shape is None:
        return {}
    metrics: dict[str, Any] = {
        "model": model,
        "embedding_dim": shape[1],
        "embedding_parameters": shape[0] * shape[1],
        "partial_embedding_parameters": len(result.vocabulary) * shape[1],
    }
    try:
        built = build_on_meta(model, trust_remote_code=trust_remote_code)
        reports = [memory_report(built, result.vocabulary, optimizer) for optimizer in OPTIMIZERS]
    except PemaError as error:
        return {**metrics, "note": f"only the embedding is counted, not the model: {error}"}
    return {**metrics, "memory": [{**report.to_dict(), "model": model} for report in reports]}


def _decode_token(tokenizer: Any, token_id: int) -> str | None:
    try:
        text = tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, OverflowError):  # a tokenizer in Python, beyond its last token
        return None
    return None if text is None else str(text)
