"""Ways to compute the loss of a language model's head, with the same arguments.

hidden [N, d], trained rows [K, d], their ids [K], targets [N], and the matrix [V, d]: in memory, or the rows on disk.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional


def open_matrix(folder: Path) -> Any:
    """Return the rows of the input embedding in a checkpoint."""
    from pema_adapters.formats.checkpoint import Checkpoint
    from pema_adapters.training.base.mapped_rows import MappedRows

    tensors = Checkpoint.open(folder).tensors
    name = next(name for name in tensors if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))
    return MappedRows.of(tensors[name])


def with_logits(hidden: Any, trained: Any, ids: Any, targets: Any, matrix: Any) -> Any:
    logits = functional.linear(hidden, matrix).index_copy(-1, ids, functional.linear(hidden, trained))
    return functional.cross_entropy(logits, targets)


def with_linear_cross_entropy(hidden: Any, trained: Any, ids: Any, targets: Any, matrix: Any) -> Any:
    return functional.linear_cross_entropy(hidden, matrix, targets)  # type: ignore[attr-defined]


def streamed(hidden: Any, trained: Any, ids: Any, targets: Any, base: Any) -> Any:
    from pema_adapters.training.output.head_matrix import HeadMatrix
    from pema_adapters.training.output.lazy_logits import make_lazy
    from pema_adapters.training.output.logit_source import Source

    matrix = HeadMatrix(base, trained, ids, ids, hidden.dtype, hidden.device, trained._version)
    return functional.cross_entropy(make_lazy(Source(hidden, matrix)), targets)


def with_rows_alone(hidden: Any, trained: Any, ids: Any, targets: Any, base: Any) -> Any:
    positions = torch.where(targets < 0, targets, torch.searchsorted(ids, targets))
    return functional.cross_entropy(functional.linear(hidden, trained), positions)


HEAD_WAYS: dict[str, Callable[..., Any]] = {
    "logits": with_logits, "linear_cross_entropy": with_linear_cross_entropy, "streamed": streamed,
    "K rows": with_rows_alone,
}  # fmt: skip
