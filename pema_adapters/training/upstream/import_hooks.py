"""Import hooks: run an action when a module is imported, so that `import pema_adapters` is cheap and order is free.

`on_import("adapters.interface", action)` runs `action(module)` now if the module is loaded, else right after it loads.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules that have an action as the other finders do, and gives them a `_Loader`."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.actions)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, then the action. An import that fails keeps the action for the next attempt."""

    def __init__(self, loader: importlib.abc.Loader, actions: dict[str, Action]) -> None:
        self._loader, self._actions = loader, actions

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        action = self._actions.get(module.__name__)
        if action is not None:
            action(module)
            self._actions.pop(module.__name__, None)


_finder = _Finder()


def on_import(name: str, action: Action) -> None:
    """Run `action` on module `name` once it is loaded; a second action for the same name replaces the first."""
    if name in sys.modules:
        action(sys.modules[name])
        _finder.actions.pop(name, None)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.actions[name] = action


def cancel(names: Iterable[str]) -> None:
    """Drop the actions of modules that are not loaded yet."""
    for name in names:
        _finder.actions.pop(name, None)
