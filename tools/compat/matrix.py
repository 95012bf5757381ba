"""The matrix of tools/compatibility.py as Markdown: equal rows are grouped, and so are equal columns."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from compat.cell import NONE, OK, OURS, REFUSED, THEIRS, Result
from compat.models import AUTO_CLASSES, FAMILIES, METHODS, WITHOUT_TEXT
from harness.tables import format_table

CHANGED = "`adapters.init` alone changes what the model computes; compared with the model after it"
AUTO_STATUS = {
    OK: "equal",
    REFUSED: "refused",
    THEIRS: "fails in adapters without PEMA, too",
    OURS: "wrong",
}
Notes = dict[str, int]


def markdown(results: Sequence[Result]) -> str:
    """Format a table for each kind of head, the reasons as footnotes, and the count."""
    notes: Notes = {}
    order = _sort(results)
    without = {each.cell.model for each in order if each.status == NONE}
    there = [each for each in order if each.cell.model not in without]
    by_head = [[each for each in there if each.cell.head == head] for head in AUTO_CLASSES]
    tables = [_one_head(some, notes) for some in by_head if some]
    footnotes = [f"[{number}] {reason}  " for reason, number in notes.items()]
    return "\n\n".join(
        part for part in (*tables, "\n".join([*footnotes, *_not_applicable(order)]), _count(order)) if part
    )


def auto_markdown(results: Sequence[Result]) -> str:
    """Format the counts by head and output policy, and the reason of everything that is not equal."""
    there = [each for each in results if each.status != NONE]
    order = sorted({_auto_row(each) for each in there})
    lines = []
    for row in order:
        found = [each.status for each in there if _auto_row(each) == row]
        lines.append([*row, *(str(found.count(status)) for status in AUTO_STATUS)])
    counts = [f"{sum(each.status == status for each in there)} {word}" for status, word in AUTO_STATUS.items()]
    reasons = Counter((each.status, each.reason) for each in there if each.reason)
    listed = [f"{count} x {AUTO_STATUS[status]}: {reason}  " for (status, reason), count in sorted(reasons.items())]
    table = format_table(["head", "output", *AUTO_STATUS.values()], lines)
    return "\n\n".join([table, "\n".join(listed), f"{len(there)} cells: {', '.join(counts)}."])


def _auto_row(result: Result) -> tuple[str, str]:
    return result.cell.head, getattr(result.cell, "policy", "")


def _count(results: Sequence[Result]) -> str:
    count = {status: sum(each.status == status for each in results) for status in (OK, THEIRS, OURS, NONE)}
    return (
        f"{len(results)} cells: {count[OK]} work, {count[THEIRS]} fail in adapters without PEMA, too, {count[OURS]} "
        f"fail with PEMA only, {count[NONE]} do not apply."
    )


def _not_applicable(results: Sequence[Result]) -> list[str]:
    """Return a line for each model that PEMA does not apply to."""
    reasons = {each.cell.model: each.reason for each in results if each.status == NONE}
    return [f"{model}: {reason}  " for model, reason in reasons.items()]


def _one_head(results: Sequence[Result], notes: Notes) -> str:
    marks: dict[str, dict[str, str]] = {}
    for each in results:
        marks.setdefault(each.cell.model, {})[each.cell.method] = _mark(each, notes)
    methods = [name for name in METHODS if any(name in row for row in marks.values())]
    columns = _group(methods, lambda method: tuple(row.get(method) for row in marks.values()))
    rows = _group(list(marks), lambda model: tuple(marks[model].get(method) for method in methods))
    changed = {each.cell.model for each in results if each.changed}
    label = {model: f"{model} [{_number(CHANGED, notes)}]" if model in changed else model for model in marks}
    lines = [
        [", ".join(label[model] for model in group), *(marks[group[0]].get(names[0], "") for names in columns)]
        for group in rows
    ]
    return format_table([results[0].cell.head, *(", ".join(names) for names in columns)], lines)


def _sort(results: Sequence[Result]) -> list[Result]:
    """Sort by model and method: results come as processes finish them."""
    models = [*FAMILIES, *WITHOUT_TEXT]
    return sorted(results, key=lambda each: (models.index(each.cell.model), METHODS.index(each.cell.method)))


def _mark(result: Result, notes: Notes) -> str:
    if result.status == OK:
        return "✓"
    reason = f"adapters without PEMA: {result.reason}" if result.status == THEIRS else result.reason
    return f"{'✗' if result.status == OURS else '–'} [{_number(reason, notes)}]"


def _number(reason: str, notes: Notes) -> int:
    return notes.setdefault(reason, len(notes) + 1)


def _group(names: Sequence[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())
