"""Context variables: what a patched function needs to know about the call that it is part of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

writing_trainer_checkpoint: ContextVar[bool] = ContextVar("writing_trainer_checkpoint", default=False)
"""True while a Trainer writes a checkpoint, which holds K rows; a user's `save_pretrained` writes all V."""

deferred_matrices: ContextVar[list[Any] | None] = ContextVar("deferred_matrices", default=None)
"""A list while `load_model` builds a model without allocating its embedding matrix: of each `DeferredMatrix`."""

saving_all_adapters: ContextVar[bool] = ContextVar("saving_all_adapters", default=False)
"""True while all adapters of a model are saved, as a Trainer does: adapters without a vocabulary are allowed then."""

pushing_rows: ContextVar[bool] = ContextVar("pushing_rows", default=False)
"""True while an adapter with PEMA is pushed to the Hub: as safetensors, for which adapters' push has no option."""


@contextmanager
def override(variable: ContextVar[Any], value: Any = True) -> Iterator[Any]:
    """Set `variable` to `value` inside the block."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
