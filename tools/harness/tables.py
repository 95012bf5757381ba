"""The one printer of Markdown tables."""

from collections.abc import Sequence

WIDEST = 170


def format_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Format rows under a header as a Markdown table, its columns aligned unless that makes lines too wide to read."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    if sum(widths) > WIDEST:
        widths = [3] * len(widths)
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)
