"""Runtime shape checks: in these tests every function of `training.embedding` checks its declared shapes and dtypes.

Signatures declare them as `Annotated[Tensor, "Float K d"]`, which costs users nothing. A fixture turns the annotations
into jaxtyping types, which beartype checks at each call: arguments and result, with one value for K in both.
"""

import functools
import importlib
import inspect
import operator
import pkgutil
import types
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch

from pema_adapters.training import embedding

try:
    import jaxtyping
    from beartype import beartype
except ImportError:  # without the "dev" extra the tests run unchecked
    jaxtyping = None

MODULES = [
    importlib.import_module(f"{embedding.__name__}.{info.name}") for info in pkgutil.iter_modules(embedding.__path__)
]


def to_jaxtyping(hint):
    """`jaxtyping.Float[Tensor, "K d"]` for `Annotated[Tensor, "Float K d"]`, in unions too; None where there is none."""
    if get_origin(hint) is Annotated:
        kind, _, shape = hint.__metadata__[0].partition(" ")
        return getattr(jaxtyping, kind)[hint.__origin__, shape]
    members = [to_jaxtyping(member) or member for member in get_args(hint)]
    is_union = isinstance(hint, types.UnionType) and members != list(get_args(hint))
    return functools.reduce(operator.or_, members) if is_union else None


def add_checks(function):
    """A copy of `function` that checks the shapes it declares; None if it declares none."""
    plain = inspect.unwrap(function)
    hints = get_type_hints(plain, include_extras=True)
    shapes = {name: shape for name, hint in hints.items() if (shape := to_jaxtyping(hint))}
    if not shapes:
        return None
    copy = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__annotations__ = plain.__kwdefaults__, plain.__qualname__, shapes
    checked = jaxtyping.jaxtyped(copy, typechecker=beartype)
    return checked if plain is function else torch.compiler.disable(checked)


def find_functions():
    """Every place of a function of the package: class or module, name, function."""
    for module in MODULES:
        classes = [
            each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__
        ]
        for owner in (module, *classes):
            for name, function in vars(owner).items():
                if inspect.isfunction(function) and function.__module__.startswith(embedding.__name__):
                    yield owner, name, function


CHECKED = [] if jaxtyping is None else [
    (owner, name, checked) for owner, name, function in find_functions() if (checked := add_checks(function))
]  # fmt: skip


@pytest.fixture(autouse=True)
def shapes_are_checked(monkeypatch):
    for owner, name, checked in CHECKED:
        monkeypatch.setattr(owner, name, checked)
