"""The figures of `pema-scan`: K and V as in the paper, and what follows from them."""

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
    """What to scan for: a tokenizer, and perhaps its model with V and d."""

    name: str
    tokenizer: Any
    model: str | None
    shape: tuple[int, int] | None

    @property
    def vocab_size(self) -> int:
        """V, of the model or else as far as the tokenizer can tell."""
        return self.shape[0] if self.shape else count_tokenizer_rows(self.tokenizer)


@dataclass(frozen=True)
class ScanResult:
    """What a tokenizer makes of the data."""

    target: ScanTarget
    scan: Scan
    vocabulary: PartialVocabulary
    cache: str  # the folder that the scan comes from; empty: from the data themselves

    @property
    def curve(self) -> Curve:
        """How its vocabulary grows."""
        return Curve(self.target.name, self.scan.growth, self.vocabulary.vocab_size)

    def iterate_unused(self) -> Iterator[tuple[int, str | None]]:
        """Ids that training never uses, increasing, with the text of the token; None for a row without a token.

        The pad token, which collators put between the texts of a batch, is used.
        """
        used = {*self.vocabulary, self.target.tokenizer.pad_token_id}
        for token_id in range(self.vocabulary.vocab_size):
            if token_id not in used:
                yield token_id, _decode_token(self.target.tokenizer, token_id)


def load_targets(options: argparse.Namespace) -> list[ScanTarget]:
    """All tokenizers and configs, loaded."""
    models = options.model or [None] * len(options.tokenizer)
    trusted = options.trust_remote_code
    shapes = [read_embedding_shape(model, trusted) if model else None for model in models]
    tokenizers = [load_tokenizer(name, trusted) for name in options.tokenizer]
    return [ScanTarget(*one) for one in zip(options.tokenizer, tokenizers, models, shapes, strict=True)]


def scan_target(subject: ScanTarget, options: argparse.Namespace) -> ScanResult:
    """Read all the data with one tokenizer, unless that was done before."""
    encoder = Encoder(subject.tokenizer, tuple(options.text_column), options.max_length)
    data, how = (
        DataSource(tuple(options.data), options.trust_remote_code),
        {"num_proc": options.num_proc, "use_cache": options.cache},
    )
    scan, cache = scan_with_cache(data, encoder, subject.vocab_size, **how)
    return ScanResult(subject, scan, PartialVocabulary(scan.token_ids, subject.vocab_size), cache)


def compute_metrics(found: ScanResult, options: argparse.Namespace) -> dict[str, Any]:
    """What the table and `--json` show, ready for JSON."""
    vocabulary, law = found.vocabulary, fit_heaps_law(found.scan.growth)
    figures: dict[str, Any] = {
        "tokenizer": found.target.name,
        "data": options.data,
        "columns": list(found.scan.columns),
        "vocab_size": vocabulary.vocab_size,
        "tokens": found.scan.tokens,
        "partial_vocab_size": len(vocabulary),
        "reduction": vocabulary.reduction,
        "growth": [list(point) for point in found.scan.growth],
        "heaps_law": None if law is None else asdict(law),
        "from_cache": bool(found.cache),
        "notes": [*found.scan.notes, *([format_cache_note(found.cache)] if found.cache else [])],
    }
    if options.unused is not None:
        pad = found.target.tokenizer.pad_token_id
        is_added = pad is not None and pad < vocabulary.vocab_size and pad not in vocabulary
        figures["unused"] = vocabulary.vocab_size - len(vocabulary) - is_added
        figures["unused_tokens"] = [list(token) for token in islice(found.iterate_unused(), options.unused)]
    return {**figures, **_compute_model_metrics(found, options.trust_remote_code)}


def _compute_model_metrics(found: ScanResult, trust_remote_code: bool) -> dict[str, Any]:
    """Of the embedding alone, from the config; of the whole model, where one can be built of it."""
    model, shape = found.target.model, found.target.shape
    if model is None or shape is None:
        return {}
    figures: dict[str, Any] = {
        "model": model,
        "embedding_dim": shape[1],
        "embedding_parameters": shape[0] * shape[1],
        "partial_embedding_parameters": len(found.vocabulary) * shape[1],
    }
    try:
        built = build_on_meta(model, trust_remote_code=trust_remote_code)
        reports = [memory_report(built, found.vocabulary, optimizer) for optimizer in OPTIMIZERS]
    except PemaError as error:
        return {**figures, "note": f"the embedding alone is counted, not the model: {error}"}
    return {**figures, "memory": [{**report.to_dict(), "model": model} for report in reports]}


def _decode_token(tokenizer: Any, token_id: int) -> str | None:
    try:
        text = tokenizer.convert_ids_to_tokens(token_id)
    except (IndexError, KeyError, OverflowError):  # of tokenizers in Python, beyond their last token
        return None
    return None if text is None else str(text)
