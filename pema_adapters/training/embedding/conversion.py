"""Convert an `nn.Embedding` to a `PartialEmbedding` in place, with every module that shares its weight, and back."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from pema_adapters.training.embedding import optimizer_state
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.embedding.unseen_monitor import UnseenCounter, UnseenMonitor

_BUFFERS = ("token_ids", "fingerprint")
_ATTRIBUTES = (
    "base", "_row_provider", "_monitor", "_counter", "_owner", "_inverse_index", "_located", "_row_index",
    "_fingerprint_is_stale", "growth_source", "was_loaded", "tied_to_output", "growing_thread",
)  # fmt: skip
"""What `convert` and a `PartialEmbedding` add to the module, and `revert` removes."""


def convert(embedding: nn.Embedding, owner: PartialEmbedding | None = None) -> PartialEmbedding:
    """Convert `embedding` in place; it keeps its full matrix.

    A subclass of `nn.Embedding` keeps its own forward (mBART, PLBart and Gemma scale the output).

    Args:
        embedding: its class changes, so that every reference to the module stays valid.
        owner: the converted embedding whose weight it shares, if any.
    """
    if isinstance(embedding, PartialEmbedding):
        return embedding
    embedding.__class__ = _get_partial_class(type(embedding))  # type: ignore[arg-type]
    partial: Any = embedding
    for name in _BUFFERS:
        partial.register_buffer(name, None)
    partial.base, partial._row_provider, partial._monitor = None, (), UnseenMonitor()
    partial._counter = UnseenCounter()
    partial._owner = () if owner is None else (owner,)
    partial._invalidate_index()
    return partial  # type: ignore[no-any-return]


def convert_all(root: nn.Module, embedding: nn.Embedding) -> PartialEmbedding:
    """Convert every embedding under `root` that shares its weight with `embedding`. Returns their owner."""
    owner = convert(embedding)
    for module in find_embeddings(root, embedding).values():
        if module is not owner:
            convert(module, owner)
    return owner


def find_embeddings(root: nn.Module, embedding: nn.Embedding) -> dict[str, nn.Embedding]:
    """Find every `nn.Embedding` under `root` with the same weight as `embedding`, by name; `embedding` is first."""
    found = {
        name: module
        for name, module in root.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is embedding.weight
    }
    return dict(sorted(found.items(), key=lambda item: item[1] is not embedding))


def find_aliases(root: nn.Module, owner: PartialEmbedding) -> dict[str, PartialEmbedding]:
    """Find every partial embedding under `root` whose owner is `owner`, by name; `owner` is one of them."""
    modules = root.named_modules()
    return {name: each for name, each in modules if isinstance(each, PartialEmbedding) and each.owner is owner}


def revert(embedding: PartialEmbedding) -> None:
    """Undo `convert` on an embedding with its full matrix: its class and attributes are as they were."""
    classes = (each for each in type(embedding).__mro__ if issubclass(each, nn.Embedding))
    original = next(each for each in classes if not issubclass(each, PartialEmbedding))
    for name in _BUFFERS:
        embedding._buffers.pop(name)
    optimizer_state.untrack(embedding)
    for name in _ATTRIBUTES:
        embedding.__dict__.pop(name, None)
    embedding.__class__ = original  # type: ignore[assignment]


@cache
def _get_partial_class(original: type[nn.Embedding]) -> type[PartialEmbedding]:
    if original is nn.Embedding:
        return PartialEmbedding
    return type(f"Partial{original.__name__}", (original, PartialEmbedding), {})
