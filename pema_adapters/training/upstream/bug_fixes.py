"""Mends of what adapters leaves wrong when it saves, loads and wraps: without them PEMA could not go with some methods.

Each is a wrapper of one point of `_upstream.POINTS`, and changes nothing where adapters is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pema_adapters.training.upstream import private_names as _upstream

if TYPE_CHECKING:
    from torch import Tensor

Names = Callable[[str], bool]


def _adapter_filter(original: Callable[..., Names], loader: Any, adapter_name: str) -> Names:
    """A model that is its own base (T5, headless ones) has no prefix before "shared_parameters.NAME."."""
    matches = original(loader, adapter_name)
    return lambda name: matches(name) or matches("." + name)


def _adapter_renaming(
    original: Callable[..., Callable[[str], str]], loader: Any, old_name: str, new_name: str
) -> Callable[[str], str]:
    """The same for `load_as`, which forgets prompt tuning altogether."""
    rename = original(loader, old_name, new_name)
    old, new = f".prompt_tunings.{old_name}.", f".prompt_tunings.{new_name}."
    return lambda name: rename("." + name).replace(old, new).removeprefix(".")


def _head_filter(original: Callable[..., Names], loader: Any, head_name: str | None) -> Names:
    """On T5 everything but "encoder", "decoder" and "shared" is taken for the head, also with a prefix before these."""
    matches, model = original(loader, head_name), loader.model
    inside = _upstream.ADDED if model.base_model is model else (model.base_model_prefix + ".",)
    return lambda name: matches(name) and not name.startswith(inside)


def _weights_to_save(original: Callable[..., dict[str, Tensor]], helper: Any, matches: Names) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory: the pool of prefix tuning, the tied bias of a masked model."""
    tensors = original(helper, matches)
    return without_shared_memory(tensors) if helper.use_safetensors else tensors


def without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first of tensors that are one and the same (loading it fills the others), and a copy of a part of another."""
    found: dict[str, Tensor] = {}
    whole: set[tuple[object, ...]] = set()
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in whole:
            continue
        found[name] = tensor.clone() if tensor.numel() and storage in storages else tensor
        whole.add(view)
        storages.add(storage)
    return found


def _wrap_merged_projection(original: Callable[..., Any], cls: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """A projection of q, k and v together that has no bias (DeBERTa, ModernBERT) would get a random one."""
    wrapped = original(cls, module, *args, **kwargs)
    if module.bias is None:
        wrapped.bias = None
    return wrapped


def _save_with_adapters(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Saving unlinks prefix tuning from its pool and never links it again, so deleting an adapter fails afterwards."""
    pools = _upstream.prefix_pools(model)
    try:
        return original(model, *args, **kwargs)
    finally:
        for layer, pool in pools:
            layer.set_pool(pool)


def _forward_context(original: Callable[..., Any], model: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
    """To reset LoRA, as every activation does, adapters opens a context for an empty input: no forward to warn of."""
    if args and hasattr(args[0], "numel") and not args[0].numel() and not model.active_adapters:
        return None
    return original(model, context, *args, **kwargs)


def _config_to_dict(original: Callable[..., dict[str, Any]], config: Any) -> dict[str, Any]:
    """What makes a DiReftConfig is no field of it: saved without, it comes back as a NoReftConfig."""
    found = original(config)
    return found if getattr(config, "subtract_projection", True) else {**found, "subtract_projection": False}


WRAPPERS: dict[str, Callable[..., Any]] = {
    "adapter_filter": _adapter_filter,
    "adapter_renaming": _adapter_renaming,
    "head_filter": _head_filter,
    "weights_to_save": _weights_to_save,
    "config_to_dict": _config_to_dict,
    "save_with_adapters": _save_with_adapters,
    "forward_context": _forward_context,
    "wrap_merged_projection": _wrap_merged_projection,
}
