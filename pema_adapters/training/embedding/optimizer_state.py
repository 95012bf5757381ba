"""Optimizer state that stays with its tokens when rows are added to a table or removed.

A hook before every `torch.optim` step remaps the state of a tracked table's weight to the rows that it has now, and
does so again after a closure that the step calls. New rows get the state of a row without gradient: zeros, as a rule.
Nobody has to hand over an optimizer, and while the rows stay the same the hook only compares two references.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pema_adapters.errors import SurgeryError
from pema_adapters.training.embedding.row_index import HasRowIndex, RowIndex

INITIAL_VALUES = {"Adagrad": {"sum": "initial_accumulator_value"}}
"""Optimizer: state that does not start at 0, and the entry of the param group with its initial value."""

ROW_MOMENTS = ("exp_avg_sq_row", "row_var")
COLUMN_MOMENTS = ("exp_avg_sq_col", "col_var")
"""Factored second moments (Adafactor in Transformers and in torch): one value per row, and means over all K rows."""

UNSUPPORTED_OPTIMIZERS = ("ASGD", "Rprop")
"""Optimizers that change the state of a row without gradient, so that a new row's state cannot be made up."""

_tables: WeakSet[HasRowIndex] = WeakSet()
_indices: WeakKeyDictionary[Optimizer, WeakKeyDictionary[HasRowIndex, RowIndex]] = WeakKeyDictionary()
"""The row index of each optimizer's state after its latest step."""


def track(table: HasRowIndex) -> None:
    """Keep the state of every optimizer of `table.weight` in line with its rows."""
    _tables.add(table)
    _register_hooks()


def untrack(table: HasRowIndex) -> None:
    """Undo `track`."""
    _tables.discard(table)


@cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Remap the state. Returns the step's arguments with a closure that remaps it again after its forward."""
    _sync_state(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None

    def call_and_sync() -> Any:
        loss = closure()
        _sync_state(optimizer)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": call_and_sync}
    return (args[0], call_and_sync, *args[2:]), kwargs


def _sync_state(optimizer: Optimizer) -> None:
    for table in tuple(_tables):
        state = _get_state(optimizer, table)
        if not state:
            continue
        indices = _indices.get(optimizer)
        old = indices.get(table) if indices else None
        old = _infer_index(optimizer, table, state) if old is None else old
        if not old.has_same_tokens(table.row_index):
            _remap_state(optimizer, table, state, old)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for table in tuple(_tables):
        if not _get_state(optimizer, table):
            continue
        if optimizer not in _indices:
            # loaded state does not say which tokens its rows belong to, only how many there are
            optimizer.register_load_state_dict_post_hook(_forget_indices)
            _indices[optimizer] = WeakKeyDictionary()
        _indices[optimizer][table] = table.row_index


def _get_state(optimizer: Optimizer, table: HasRowIndex) -> dict[str, Any] | None:
    """Return the state for the weight of a table; LBFGS keeps that of all weights with the first."""
    if isinstance(optimizer, LBFGS):
        weights = optimizer.param_groups[0]["params"]
        return optimizer.state.get(weights[0]) if any(each is table.weight for each in weights) else None
    return optimizer.state.get(table.weight)


def _forget_indices(optimizer: Optimizer) -> None:
    for table in tuple(_indices.get(optimizer, ())):
        del _indices[optimizer][table]


def _infer_index(optimizer: Optimizer, table: HasRowIndex, state: dict[str, Any]) -> RowIndex:
    """Return the index of state that was loaded or made in advance: the table's only index of that size.

    Raises: SurgeryError if the table never had that size.
    """
    counts = {count for key, value in state.items() if (count := _count_rows(key, value, table)) is not None}
    if counts <= {len(table.weight)}:
        return table.row_index
    ancestor = table.row_index.ancestor(min(counts)) if len(counts) == 1 else None
    if ancestor is None:
        raise SurgeryError(
            f"the state of {type(optimizer).__name__} is for {min(counts)} embedding rows, the model has "
            f"{len(table.weight)}: load the state that was saved with these rows, or make a new optimizer"
        )
    return ancestor


def _count_rows(key: str, value: Any, table: HasRowIndex) -> int | None:
    if not isinstance(value, Tensor) or key in COLUMN_MOMENTS:
        return None
    is_per_row = key in ROW_MOMENTS or (value.ndim == 2 and value.shape[1] == table.weight.shape[1])
    return value.shape[0] if is_per_row else None


def _remap_state(optimizer: Optimizer, table: HasRowIndex, state: dict[str, Any], old: RowIndex) -> None:
    """Remap all of the state or nothing. Raises: SurgeryError where it cannot be remapped."""
    remapped = {key: _remap_value(optimizer, table, key, value, old) for key, value in state.items()}
    state.update(remapped)


def _remap_value(optimizer: Optimizer, table: HasRowIndex, key: str, value: Any, old: RowIndex) -> Any:
    new = table.row_index
    if not _holds_tensors(value) or (isinstance(value, Tensor) and value.numel() <= 1):
        return value
    is_supported = type(value) in (Tensor, nn.Parameter) and value.is_floating_point()
    if not is_supported or type(optimizer).__name__ in UNSUPPORTED_OPTIMIZERS:
        raise _make_error(optimizer, table, key, value, old)
    if value.shape == (len(old), *table.weight.shape[1:]):
        return new.remap(value, old, _get_initial_value(optimizer, table, key))
    if key in ROW_MOMENTS and value.numel() == len(old):
        return new.remap(value, old)
    if key in COLUMN_MOMENTS and value.numel() == table.weight.shape[1] and old.is_subset_of(new):
        return value * (len(old) / len(new))  # a mean over all rows, to which new rows contribute zeros
    if value.shape == table.weight.shape:
        return value  # created since the rows changed
    raise _make_error(optimizer, table, key, value, old)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(_holds_tensors, value)) if isinstance(value, (list, tuple)) else isinstance(value, Tensor)


def _get_initial_value(optimizer: Optimizer, table: HasRowIndex, key: str) -> float:
    name = INITIAL_VALUES.get(type(optimizer).__name__, {}).get(key)
    group = next(group for group in optimizer.param_groups if any(each is table.weight for each in group["params"]))
    return float(group[name]) if name else 0.0


def _make_error(optimizer: Optimizer, table: HasRowIndex, key: str, value: Any, old: RowIndex) -> SurgeryError:
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return SurgeryError(
        f"{type(optimizer).__name__} keeps {key!r} ({found}) for the embedding rows, which cannot be remapped from "
        f"{len(old)} rows to {len(table.weight)}: train with one whose state is a number for each weight "
        "(torch.optim.AdamW, say), or give shrink_embeddings all of the data before training"
    )
