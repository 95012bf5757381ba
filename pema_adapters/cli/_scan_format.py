"""Format the metrics of `pema-scan` as text."""

from collections.abc import Sequence
from typing import Any

from pema_adapters.cli._table import format_table
from pema_adapters.io.escaping import escape_terminal

Metrics = dict[str, Any]

LABELS = {
    "tokenizer": "tokenizer",
    "data": "data",
    "columns": "columns",
    "model": "model",
    "vocab_size": "rows of the embedding (V)",
    "tokens": "tokens seen",
    "partial_vocab_size": "distinct tokens (K)",
    "reduction": "reduction",
    "unused": "tokens never used",
    "embedding_dim": "embedding width (d)",
    "embedding_parameters": "embedding parameters",
    "partial_embedding_parameters": "  with PEMA",
    "rows_kept": "rows in training",
    "rows_saved": "embedding rows saved",
    "parameters": "model parameters",
    "parameters_saved": "  saved",
}
COLUMNS = {
    "tokenizer": "tokenizer",
    "model": "model",
    "vocab_size": "V",
    "tokens": "tokens seen",
    "partial_vocab_size": "K",
    "reduction": "reduction",
    "rows_saved": "rows saved",
    "parameters_saved": "model parameters saved",
    "unused": "never used",
}
OPTIMIZERS = {"adamw_fp32": "AdamW fp32", "adamw_bf16": "AdamW bf16", "adamw_8bit": "AdamW 8-bit"}
MEMORY = ("weights", "gradients", "optimizer_states", "total")
TIED_HEAD = (
    "the output of {} is tied to its embedding and streams it from disk: without PEMA, logits take {:.1f} MB more for "
    "each token with a label"
)


def format_metrics(all_metrics: Sequence[Metrics]) -> str:
    """Return the text: a list for one tokenizer, a table for several; then memory, unused tokens, and notes."""
    cells = [_format_cells(metrics) for metrics in all_metrics]
    parts = [_format_list(cells[0]) if len(cells) == 1 else format_table(_build_rows(cells))]
    if any("memory" in metrics for metrics in all_metrics):
        parts.append(format_table(_build_memory_rows(all_metrics)))
    parts += [_format_unused(metrics, len(cells) > 1) for metrics in all_metrics if metrics.get("unused_tokens")]
    if notes := [f"note: {note}" for metrics in all_metrics for note in _collect_notes(metrics)]:
        parts.append("\n".join(dict.fromkeys(map(escape_terminal, notes))))
    return "\n\n".join(parts)


def _format_cells(metrics: Metrics) -> dict[str, str]:
    """Return every metric as text, by its key in LABELS."""
    report = metrics.get("memory", [None])[0]
    cells = {key: _format_cell(key, value) for key, value in metrics.items() if key in LABELS}
    if report:
        cells["rows_kept"] = f"{report['partial_vocab_size']:,} (K, and ids that the model inserts itself)"
        cells["rows_saved"] = _format_share(report["embedding_rows_saved"], report["vocab_size"])
        cells["parameters"] = f"{report['parameters']:,} ({report['built']})"
        cells["parameters_saved"] = _format_share(report["parameters_saved"], report["parameters"])
    return cells


def _format_cell(key: str, value: Any) -> str:
    if key == "reduction" or isinstance(value, int):
        return f"{value:.1%}" if key == "reduction" else f"{value:,}"
    return escape_terminal(", ".join(value) if isinstance(value, list) else str(value))


def _format_share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def _format_list(cells: dict[str, str]) -> str:
    width = max(map(len, LABELS.values()))
    return "\n".join(f"{LABELS[key].ljust(width)}  {cells[key]}" for key in LABELS if key in cells)


def _build_rows(cells: Sequence[dict[str, str]]) -> list[list[str]]:
    keys = [key for key in COLUMNS if any(key in row for row in cells)]
    return [[COLUMNS[key] for key in keys], *([row.get(key, "") for key in keys] for row in cells)]


def _build_memory_rows(all_metrics: Sequence[Metrics]) -> list[list[str]]:
    """Return the memory saved in full fine-tuning, one row for each optimizer of each model."""
    named = len(all_metrics) > 1
    head = [*(["model"] if named else []), "saved in training", *(name.replace("_", " ") for name in MEMORY), "of"]
    rows = [head]
    for report in (report for metrics in all_metrics for report in metrics.get("memory", [])):
        saved, before = report["saved"], report["before"]["total"]
        amounts = [_format_bytes(saved[name]) for name in MEMORY]
        share = f"{_format_bytes(before)} ({saved['total'] / before:.1%})"
        rows.append(
            [*([escape_terminal(report["model"])] if named else []), OPTIMIZERS[report["optimizer"]], *amounts, share]
        )
    return rows


def _format_bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} B"


def _format_unused(metrics: Metrics, named: bool) -> str:
    """Return the list of unused tokens, as in table 1 of the paper."""
    of = f" of {escape_terminal(metrics['tokenizer'])}" if named else ""
    head = f"never used{of}, the first {len(metrics['unused_tokens'])}:"
    tokens = metrics["unused_tokens"]
    return f"{head}\n" + format_table(
        [("", f"{i:,}", "no token" if text is None else repr(text)) for i, text in tokens]
    )


def _collect_notes(metrics: Metrics) -> list[str]:
    notes = [*metrics["notes"], *([metrics["note"]] if "note" in metrics else [])]
    logits = max((report["logits_per_token"] for report in metrics.get("memory", [])), default=0)
    if logits:
        notes.append(TIED_HEAD.format(metrics["model"], logits / 1e6))
    return notes
