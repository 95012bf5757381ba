"""A text data set that every machine has: the docstrings of Python's standard library, labelled by area of the
library.
"""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

AREAS = {
    "text and numbers": "string re difflib textwrap stringprep decimal fractions random statistics numbers _pydecimal",
    "data types": "datetime calendar collections heapq bisect copy enum types weakref pprint reprlib graphlib zoneinfo",
    "files and formats": "pathlib shutil tempfile fileinput glob tarfile zipfile gzip bz2 lzma pickle shelve csv "
    "configparser tomllib plistlib sqlite3 dbm",
    "system": "os platform argparse optparse logging getpass curses ctypes subprocess signal locale gettext",
    "concurrency": "threading multiprocessing concurrent asyncio queue sched selectors contextvars",
    "internet": "socket ssl urllib http ftplib poplib imaplib smtplib socketserver xmlrpc email mailbox mimetypes "
    "wsgiref",
    "development": "unittest doctest pdb bdb cProfile timeit trace tracemalloc inspect ast dis traceback typing pydoc",
    "packaging and import": "importlib zipimport pkgutil modulefinder runpy venv ensurepip distutils lib2to3",
    "windows and drawing": "tkinter turtle turtledemo colorsys",
}
"""Area: the modules that the library reference puts there."""

SHORTEST = 40
"""Docstrings of fewer characters say too little."""


def load() -> DatasetDict:
    """Return splits train and test with columns text and label; a docstring's split depends on its text alone."""
    splits: dict[str, dict[str, list[object]]] = {name: {"text": [], "label": []} for name in ("train", "test")}
    for text, area in sorted(set(_find_docstrings())):
        held_out = hashlib.sha256(text.encode()).digest()[0] < 51
        split = splits["test" if held_out else "train"]
        split["text"].append(text)
        split["label"].append(area)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(AREAS))})
    return DatasetDict({name: Dataset.from_dict(rows, features=features) for name, rows in splits.items()})


def _find_docstrings() -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for area, modules in AREAS.items():
        for module in modules.split():
            for text in _parse_docstrings(module):
                if text not in seen:
                    seen.add(text)
                    yield text, area


def _parse_docstrings(module: str) -> Iterator[str]:
    if module not in sys.stdlib_module_names:
        return
    library = Path(sysconfig.get_path("stdlib"))
    single, package = library / f"{module}.py", library / module
    for path in [single] if single.exists() else sorted(package.rglob("*.py")):
        if not {"test", "tests", "idlelib"} & set(path.relative_to(library).parts):
            yield from _docstrings_of(path)


def _docstrings_of(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) >= SHORTEST:
                yield text


if __name__ == "__main__":
    data = load()
    for name, split in data.items():
        counts = [split["label"].count(i) for i in range(len(AREAS))]
        print(name, len(split), dict(zip(AREAS, counts, strict=True)))
