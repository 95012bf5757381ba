"""Imports go one way: a package imports those below it in `LAYERS`, never one above or beside it."""

import ast
from pathlib import Path

import pema_adapters

PACKAGE = Path(pema_adapters.__file__).parent
LAYERS = [
    {"__main__"},
    {"cli"},
    {"publishing", "analysis"},
    {"merging", "training"},
    {"vocabulary"},
    {"scanning"},
    {"hub"},
    {"formats"},
    {"io"},
    {"errors"},
    {"io.escaping"},  # errors makes messages safe for a terminal
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def layer_of(module):
    """The name in `LAYERS` that stands for a module."""
    return module if module in LEVEL else module.split(".")[0]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(path.read_text())


def imported(tree):
    """Modules of this package that another one imports, at its top or within a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pema_adapters."):
            yield node.module.removeprefix("pema_adapters.")


def test_imports_go_one_way():
    wrong = []
    for module, tree in modules():
        above = layer_of(module)
        for other in imported(tree):
            below = layer_of(other)
            if above != below and LEVEL[above] >= LEVEL[below]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_every_module_has_a_layer():
    assert [module for module, _ in modules() if layer_of(module) not in LEVEL] == []


def test_the_test_sees_imports():
    assert {layer_of(other) for _, tree in modules() for other in imported(tree)} >= {"formats", "io", "merging"}
