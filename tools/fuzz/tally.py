"""Counts of a fuzzer's outcomes, as a table."""

from collections.abc import Mapping, Sequence

from harness.tables import format_table

KINDS = ("refused", "merged", "escaped")


def format_counts(counts: Mapping[str, Mapping[str, int]], kinds: Sequence[str]) -> str:
    """Format `{family: {kind: number}}` with a last row for all families."""
    rows = [[family, *(found.get(kind, 0) for kind in kinds)] for family, found in sorted(counts.items())]
    rows.append(["all", *(sum(found.get(kind, 0) for found in counts.values()) for kind in kinds)])
    return format_table(["family", *kinds], rows)
