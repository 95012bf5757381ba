"""Format the report of `pema-merge` as text."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pema_adapters.errors import PemaError
from pema_adapters.io.escaping import escape_terminal, format_python_literal

if TYPE_CHECKING:
    from pema_adapters.merging.report import MergeReport

MAX_LINE = 10_000
"""Characters of a line of the summary: enough for the lines to copy and paste."""


def format_summary(report: "MergeReport", options: argparse.Namespace) -> str:
    """Return the report as text: first what happened, last how to load the result if part of it stays an adapter."""
    where = report.output or options.push_to_hub
    lines = [
        f"{_describe_outcome(options)} {where} ({report.bytes_written / 1e6:,.1f} MB in {report.seconds:.1f} s)",
        f"  rows:    {report.rows_merged:,} of {report.vocab_size:,} in the embedding matrix",
        f"  tensors: {report.tensors_changed:,} changed, {report.tensors_copied:,} {_describe_copied(options)}",
    ]
    if report.tensors_folded:
        lines.append(f"  folded:  the adapter's updates of {report.tensors_folded:,} weights")
    if report.max_rounding_error:
        lines.append(f"  casts:   largest rounding error {report.max_rounding_error:.3g}")
    if options.verify and not options.dry_run:
        lines.append("  verified: every byte is the base's or the delta's")
    lines += [f"  note:    {note}" for note in report.notes]
    return "\n".join(escape_terminal(line, MAX_LINE) for line in lines + _format_load_snippet(report))


def _describe_outcome(options: argparse.Namespace) -> str:
    if options.push_to_hub and not options.output:
        return "would push to" if options.dry_run else "pushed to"
    return "would write" if options.dry_run else "changed" if options.in_place else "wrote"


def _describe_copied(options: argparse.Namespace) -> str:
    if options.in_place:
        return "untouched"
    return "copied byte for byte" if options.dtype == "auto" else f"as they were, in {options.dtype}"


def _format_load_snippet(report: "MergeReport") -> list[str]:
    """Return the Python lines that load checkpoint and adapters, none if nothing stays an adapter."""
    from pema_adapters.formats.checkpoint import CONFIG
    from pema_adapters.formats.json_object import read_json
    from pema_adapters.merging.load_snippet import RemainingAdapterFiles, load_snippet

    output = Path(report.output)
    left = {name: output / "adapters" / name for name in report.adapters_left}
    if not left or not all(folder.is_dir() for folder in left.values()):
        return []
    try:
        config = read_json(output / CONFIG) if (output / CONFIG).exists() else {}
        adapters = {name: RemainingAdapterFiles.read(partial(_read_file, folder)) for name, folder in left.items()}
    except (OSError, PemaError) as error:  # the merge has succeeded all the same
        return [escape_terminal(f"  cannot show how to load both: {error}")]
    lines = load_snippet(report.output, config, adapters, lambda name: format_python_literal(str(left[name])))
    return ["  load both, in Python (import adapters, transformers):", *(f"    {line}" for line in lines)]


def _read_file(folder: Path, name: str) -> bytes | None:
    return (folder / name).read_bytes() if (folder / name).is_file() else None
