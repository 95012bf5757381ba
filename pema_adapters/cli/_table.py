"""Format rows of text as a table with aligned columns, for a terminal."""

from collections.abc import Iterable, Sequence


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as lines, with columns two spaces apart; columns of numbers are right-aligned."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_right = [any(cell[:1].isdigit() or cell.startswith("-") for cell in column) for column in columns]
    return "\n".join(_format_row(row, widths, is_right) for row in rows)


def _format_row(row: Iterable[str], widths: Iterable[int], is_right: Iterable[bool]) -> str:
    cells = zip(row, widths, is_right, strict=True)
    return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()
