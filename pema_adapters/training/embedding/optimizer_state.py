"""Optimizer state that follows the rows of a table: the state of a row stays with its token when others come.

A hook before every `torch.optim` step lays out the state of a table's weight for the rows that it has now, and again
behind a closure that the step calls. New rows get what a row without gradient has: zeros, as a rule. Nobody has to hand
over an optimizer, and where no row has come or gone the hook compares two references.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pema_adapters.errors import SurgeryError
from pema_adapters.training.embedding.row_index import LaidOut, Layout

FIRST_VALUES = {"Adagrad": {"sum": "initial_accumulator_value"}}
"""Optimizer: state whose rows start with another number than 0, which its param group has under this name."""

ROW_MEANS = ("exp_avg_sq_row", "row_var")
COLUMN_MEANS = ("exp_avg_sq_col", "col_var")
"""Factored second moments (Adafactor's in Transformers and in torch): a number a row, and means over all K rows."""

MOVE_WITHOUT_GRADIENT = ("ASGD", "Rprop")
"""Optimizers in whose state a row without gradient is neither constant nor zero."""

_tables: WeakSet[LaidOut] = WeakSet()
_seen: WeakKeyDictionary[Optimizer, WeakKeyDictionary[LaidOut, Layout]] = WeakKeyDictionary()
"""The layout that the state of an optimizer had after its latest step."""


def follow(table: LaidOut) -> None:
    """Have the state of every optimizer of `table.weight` follow its rows."""
    _tables.add(table)
    _watch_optimizers()


def forget(table: LaidOut) -> None:
    """Undo `follow`."""
    _tables.discard(table)


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns arguments with a closure (forward and backward within the step) behind which state follows as well."""
    _follow_rows(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None

    def followed() -> Any:
        loss = closure()
        _follow_rows(optimizer)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": followed}
    return (args[0], followed, *args[2:]), kwargs


def _follow_rows(optimizer: Optimizer) -> None:
    for table in tuple(_tables):
        state = _state_of(optimizer, table)
        if not state:
            continue
        layouts = _seen.get(optimizer)
        old = layouts.get(table) if layouts else None
        old = _deduced(optimizer, table, state) if old is None else old
        if not old.agrees(table.layout):
            _lay_out(optimizer, table, state, old)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for table in tuple(_tables):
        if not _state_of(optimizer, table):
            continue
        if optimizer not in _seen:
            # state that comes from elsewhere says nothing of its layout but its size
            optimizer.register_load_state_dict_post_hook(_forget_layouts)
            _seen[optimizer] = WeakKeyDictionary()
        _seen[optimizer][table] = table.layout


def _state_of(optimizer: Optimizer, table: LaidOut) -> dict[str, Any] | None:
    """The state for the weight of a table, which may be that of all weights; none while there is none."""
    if isinstance(optimizer, LBFGS):  # keeps it with the first
        weights = optimizer.param_groups[0]["params"]
        return optimizer.state.get(weights[0]) if any(one is table.weight for one in weights) else None
    return optimizer.state.get(table.weight)


def _forget_layouts(optimizer: Optimizer) -> None:
    for table in tuple(_seen.get(optimizer, ())):
        del _seen[optimizer][table]


def _deduced(optimizer: Optimizer, table: LaidOut, state: dict[str, Any]) -> Layout:
    """The layout of state that was loaded or made in advance: the only one of its size that the table had."""
    counts = {count for key, value in state.items() if (count := _row_count(key, value, table)) is not None}
    if counts <= {len(table.weight)}:
        return table.layout
    former = table.layout.former(min(counts)) if len(counts) == 1 else None
    if former is None:
        raise SurgeryError(
            f"the state of {type(optimizer).__name__} is for {min(counts)} embedding rows, the model has "
            f"{len(table.weight)}: load the state that was saved with these rows, or make a new optimizer"
        )
    return former


def _row_count(key: str, value: Any, table: LaidOut) -> int | None:
    if not isinstance(value, Tensor) or key in COLUMN_MEANS:
        return None
    by_row = key in ROW_MEANS or (value.ndim == 2 and value.shape[1] == table.weight.shape[1])
    return value.shape[0] if by_row else None


def _lay_out(optimizer: Optimizer, table: LaidOut, state: dict[str, Any], old: Layout) -> None:
    """Replace the state, all of it or nothing. Raises: SurgeryError where it cannot follow the rows."""
    carried = {key: _carried(optimizer, table, key, value, old) for key, value in state.items()}
    state.update(carried)


def _carried(optimizer: Optimizer, table: LaidOut, key: str, value: Any, old: Layout) -> Any:
    new = table.layout
    if not _holds_tensors(value) or (isinstance(value, Tensor) and value.numel() <= 1):
        return value
    fits = type(value) in (Tensor, nn.Parameter) and value.is_floating_point()
    if not fits or type(optimizer).__name__ in MOVE_WITHOUT_GRADIENT:
        raise _cannot_follow(optimizer, table, key, value, old)
    if value.shape == (len(old), *table.weight.shape[1:]):
        return new.carry(value, old, _first_value(optimizer, table, key))
    if key in ROW_MEANS and value.numel() == len(old):
        return new.carry(value, old)
    if key in COLUMN_MEANS and value.numel() == table.weight.shape[1] and old.lies_within(new):
        return value * (len(old) / len(new))  # a mean over all rows: those that are new had no gradient
    if value.shape == table.weight.shape:
        return value  # made anew since
    raise _cannot_follow(optimizer, table, key, value, old)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return any(map(_holds_tensors, value)) if isinstance(value, (list, tuple)) else isinstance(value, Tensor)


def _first_value(optimizer: Optimizer, table: LaidOut, key: str) -> float:
    name = FIRST_VALUES.get(type(optimizer).__name__, {}).get(key)
    group = next(group for group in optimizer.param_groups if any(one is table.weight for one in group["params"]))
    return float(group[name]) if name else 0.0


def _cannot_follow(optimizer: Optimizer, table: LaidOut, key: str, value: Any, old: Layout) -> SurgeryError:
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return SurgeryError(
        f"{type(optimizer).__name__} keeps {key!r} ({found}) for the embedding rows, which cannot follow them from "
        f"{len(old)} rows to {len(table.weight)}: train with one whose state is a number for each weight "
        "(torch.optim.AdamW, say), or give shrink_embeddings all of the data before training"
    )
