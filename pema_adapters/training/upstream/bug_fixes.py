"""Fixes for bugs in adapters 1.3 that would break saving, loading or wrapping of methods combined with PEMA.

Each wraps one of `PATCH_TARGETS` and has its name; where adapters is right, nothing changes. `merged_layers.py` holds
the fixes for `merge_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pema_adapters.training.upstream.adapters_internals import ADAPTER_PREFIXES, find_prefix_pools

if TYPE_CHECKING:
    from torch import Tensor

NameFilter = Callable[[str], bool]


def _adapter_filter(original: Callable[..., NameFilter], loader: Any, adapter_name: str) -> NameFilter:
    """Match ".shared_parameters.NAME." without a prefix too: a model that is its own base model (T5) has none."""
    matches = original(loader, adapter_name)
    return lambda name: matches(name) or matches("." + name)


def _adapter_renaming(
    original: Callable[..., Callable[[str], str]], loader: Any, old_name: str, new_name: str
) -> Callable[[str], str]:
    """Rename names without a prefix, and those of prompt tuning, when `load_as` loads an adapter under a new name."""
    rename = original(loader, old_name, new_name)
    old, new = f".prompt_tunings.{old_name}.", f".prompt_tunings.{new_name}."
    return lambda name: rename("." + name).replace(old, new).removeprefix(".")


def _head_filter(original: Callable[..., NameFilter], loader: Any, head_name: str | None) -> NameFilter:
    """Exclude the base model from the head: on T5, adapters takes all but "encoder", "decoder" and "shared" for it."""
    matches, model = original(loader, head_name), loader.model
    inside = ADAPTER_PREFIXES if model.base_model is model else (model.base_model_prefix + ".",)
    return lambda name: matches(name) and not name.startswith(inside)


def _weights_to_save(original: Callable[..., dict[str, Tensor]], helper: Any, matches: NameFilter) -> dict[str, Tensor]:
    """Drop shared tensors, which safetensors refuses: the pool of prefix tuning, the tied bias of a masked LM."""
    tensors = original(helper, matches)
    return drop_shared_tensors(tensors) if helper.use_safetensors else tensors


def drop_shared_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors none of which shares memory with another.

    Of tensors that are identical views of one storage the first is kept, since loading it fills the others; a
    different view of a storage that is in use already is cloned.
    """
    found: dict[str, Tensor] = {}
    views: set[tuple[object, ...]] = set()
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in views:
            continue
        found[name] = tensor.clone() if tensor.numel() and storage in storages else tensor
        views.add(view)
        storages.add(storage)
    return found


def _wrap_fused_projection(original: Callable[..., Any], cls: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep a fused QKV projection without a bias that way (DeBERTa, ModernBERT): adapters gives it a random one."""
    wrapped = original(cls, module, *args, **kwargs)
    if module.bias is None:
        wrapped.bias = None
    return wrapped


def _save_with_adapters(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Link prefix tuning to its pool again: saving unlinks it for good, and `delete_adapter` fails afterwards."""
    pools = find_prefix_pools(model)
    try:
        return original(model, *args, **kwargs)
    finally:
        for layer, pool in pools:
            layer.set_pool(pool)


def _forward_context(original: Callable[..., Any], model: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
    """Skip the warning that no adapter is active where no forward follows.

    Every activation resets LoRA, for which adapters opens a forward context with an empty input.
    """
    if args and hasattr(args[0], "numel") and not args[0].numel() and not model.active_adapters:
        return None
    return original(model, context, *args, **kwargs)


def _config_to_dict(original: Callable[..., dict[str, Any]], config: Any) -> dict[str, Any]:
    """Save `subtract_projection`, which is no field of a config: without it a DiReftConfig loads as NoReftConfig."""
    found = original(config)
    return found if getattr(config, "subtract_projection", True) else {**found, "subtract_projection": False}


BUG_FIXES: dict[str, Callable[..., Any]] = {
    "adapter_filter": _adapter_filter,
    "adapter_renaming": _adapter_renaming,
    "head_filter": _head_filter,
    "weights_to_save": _weights_to_save,
    "config_to_dict": _config_to_dict,
    "save_with_adapters": _save_with_adapters,
    "forward_context": _forward_context,
    "wrap_fused_projection": _wrap_fused_projection,
}
