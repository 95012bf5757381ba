"""The matrix of tools/compatibility.py as Markdown: rows and columns that are equal throughout stand together."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from _compat_cell import NONE, OK, OURS, REFUSED, THEIRS, Result
from _compat_models import AUTO_CLASSES, FAMILIES, METHODS, WITHOUT_TEXT

BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"
CHANGED = "`adapters.init` alone changes what the model computes; compared with the model after it"
AUTO_STATUS = {
    OK: "equal",
    REFUSED: "refused",
    THEIRS: "fails in adapters without PEMA, too",
    OURS: "wrong",
}
Notes = dict[str, int]


def markdown(results: Sequence[Result]) -> str:
    """A table for each kind of head, the reasons as footnotes, and the count."""
    notes: Notes = {}
    order = _sorted(results)
    without = {each.cell.model for each in order if each.status == NONE}
    there = [each for each in order if each.cell.model not in without]
    by_head = [[each for each in there if each.cell.head == head] for head in AUTO_CLASSES]
    tables = [_one_head(some, notes) for some in by_head if some]
    footnotes = [f"[{number}] {reason}  " for reason, number in notes.items()]
    return "\n\n".join(
        part for part in (*tables, "\n".join([*footnotes, *_not_applicable(order)]), _count(order)) if part
    )


def auto_markdown(results: Sequence[Result]) -> str:
    """Counts by head and output policy, and the reasons of all that is neither equal nor refused."""
    there = [each for each in results if each.status != NONE]
    order = sorted({_auto_row(each) for each in there})
    lines = [["head", "output", *AUTO_STATUS.values()], ["---"] * (2 + len(AUTO_STATUS))]
    for row in order:
        found = [each.status for each in there if _auto_row(each) == row]
        lines.append([*row, *(str(found.count(status)) for status in AUTO_STATUS)])
    counts = [f"{sum(each.status == status for each in there)} {word}" for status, word in AUTO_STATUS.items()]
    reasons = Counter((each.status, each.reason) for each in there if each.reason)
    listed = [f"{count} x {AUTO_STATUS[status]}: {reason}  " for (status, reason), count in sorted(reasons.items())]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
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
    """A line for each model that PEMA has nothing to do with."""
    reasons = {each.cell.model: each.reason for each in results if each.status == NONE}
    return [f"{model}: {reason}  " for model, reason in reasons.items()]


def _one_head(results: Sequence[Result], notes: Notes) -> str:
    marks: dict[str, dict[str, str]] = {}
    for each in results:
        marks.setdefault(each.cell.model, {})[each.cell.method] = _mark(each, notes)
    methods = [name for name in METHODS if any(name in row for row in marks.values())]
    columns = _grouped(methods, lambda method: tuple(row.get(method) for row in marks.values()))
    rows = _grouped(list(marks), lambda model: tuple(marks[model].get(method) for method in methods))
    lines = [[results[0].cell.head, *(", ".join(names) for names in columns)], ["---"] * (len(columns) + 1)]
    changed = {each.cell.model for each in results if each.changed}
    label = {model: f"{model} [{_number(CHANGED, notes)}]" if model in changed else model for model in marks}
    lines += [
        [", ".join(label[model] for model in group), *(marks[group[0]].get(names[0], "") for names in columns)]
        for group in rows
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _sorted(results: Sequence[Result]) -> list[Result]:
    """In the order of models and methods: results come as processes finish them."""
    models = [*FAMILIES, *WITHOUT_TEXT]
    return sorted(results, key=lambda each: (models.index(each.cell.model), METHODS.index(each.cell.method)))


def _mark(result: Result, notes: Notes) -> str:
    if result.status == OK:
        return "✓"
    reason = f"adapters without PEMA: {result.reason}" if result.status == THEIRS else result.reason
    return f"{'✗' if result.status == OURS else '–'} [{_number(reason, notes)}]"


def _number(reason: str, notes: Notes) -> int:
    return notes.setdefault(reason, len(notes) + 1)


def _grouped(names: Sequence[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())


def write_readme(path: Path, results: Sequence[Result]) -> None:
    """Put the matrix between the marks. Raises: ValueError where the file has none."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no block from {BEGIN} to {END}: put the two lines where the matrix is to be")
    path.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}", encoding="utf-8")
