"""Wrapping and unwrapping the functions of adapters and Transformers that PEMA extends.

`PATCH_TARGETS` lists these functions; the wrappers are in `training/patches.py` and `bug_fixes.py`. `patch` wraps the
targets of one module, once; `unpatch` restores every original.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any

from pema_adapters.errors import PemaError

PATCH_TARGETS = {
    "config_class": ("adapters.configuration.adapter_config", "AdapterConfig", "_get_config_class"),
    "config_to_dict": ("adapters.configuration.adapter_config", "AdapterConfig", "to_dict"),
    "methods_of_config": ("adapters.interface", "AdapterMethod", "get_from_config"),
    "add_adapter": ("adapters.model_mixin", "ModelWithHeadsAdaptersMixin", "add_adapter"),
    "add_adapter_weights": ("adapters.model_mixin", "ModelAdaptersMixin", "_add_adapter_weights"),
    "set_active_adapters": ("adapters.model_mixin", "ModelAdaptersMixin", "set_active_adapters"),
    "get_adapter": ("adapters.model_mixin", "ModelAdaptersMixin", "get_adapter"),
    "supports_adapter": ("adapters.model_mixin", "ModelAdaptersMixin", "supports_adapter"),
    "merge_adapter": ("adapters.model_mixin", "ModelAdaptersMixin", "merge_adapter"),
    "reset_adapter": ("adapters.model_mixin", "ModelAdaptersMixin", "reset_adapter"),
    "delete_adapter": ("adapters.model_mixin", "ModelAdaptersMixin", "delete_adapter"),
    "save_adapter": ("adapters.model_mixin", "ModelAdaptersMixin", "save_adapter"),
    "save_all_adapters": ("adapters.model_mixin", "ModelAdaptersMixin", "save_all_adapters"),
    "save_all_adapters_and_heads": ("adapters.model_mixin", "ModelWithHeadsAdaptersMixin", "save_all_adapters"),
    "save_with_adapters": ("adapters.model_mixin", "ModelAdaptersMixin", "save_pretrained"),
    "forward_context": ("adapters.model_mixin", "ModelAdaptersMixin", "forward_context"),
    "adapter_summary": ("adapters.model_mixin", "ModelAdaptersMixin", "adapter_summary"),
    "load_pretrained": ("transformers.modeling_utils", "PreTrainedModel", "_load_pretrained_model"),
    "save_pretrained": ("transformers.modeling_utils", "PreTrainedModel", "save_pretrained"),
    "resize_token_embeddings": ("transformers.modeling_utils", "PreTrainedModel", "resize_token_embeddings"),
    "tie_weights": ("transformers.modeling_utils", "PreTrainedModel", "_tie_or_clone_weights"),
    "read_config": ("transformers.configuration_utils", "PretrainedConfig", "get_config_dict"),
    "save_checkpoint": ("transformers.trainer", "Trainer", "_save_checkpoint"),
    "save_weights": ("adapters.loading", "WeightsLoaderHelper", "save_weights"),
    "load_weights": ("adapters.loading", "WeightsLoaderHelper", "load_weights"),
    "weights_to_save": ("adapters.loading", "WeightsLoaderHelper", "state_dict"),
    "adapter_filter": ("adapters.loading", "AdapterLoader", "filter_func"),
    "adapter_renaming": ("adapters.loading", "AdapterLoader", "rename_func"),
    "head_filter": ("adapters.loading", "PredictionHeadLoader", "filter_func"),
    "wrap_fused_projection": ("adapters.methods.lora", "LoRAMergedLinear", "wrap"),
    "push_adapter": ("adapters.hub_mixin", "PushAdapterToHubMixin", "push_adapter_to_hub"),
    "push_adapter_setup": ("adapters.hub_mixin", "PushAdapterToHubMixin", "push_adapter_setup_to_hub"),
    "adapter_card": ("adapters.hub_mixin", "PushAdapterToHubMixin", "_save_adapter_card"),
}
"""Target name: module, class, function."""

PATCHED_MODULES = tuple(dict.fromkeys(module for module, _, _ in PATCH_TARGETS.values()))

_originals: list[tuple[Any, str, Any]] = []


def patch(module: ModuleType, wrappers: Mapping[str, Callable[..., Any]]) -> None:
    """Wrap the targets in `module`, all or none; targets that are wrapped already stay as they are.

    Args:
        module: an imported module of adapters or Transformers.
        wrappers: by target name; each is called with the original function and its arguments.

    Raises:
        PemaError: a target is missing, so the installed version is not supported.
    """
    targets = {
        target: (owner, name) for target, (where, owner, name) in PATCH_TARGETS.items() if where == module.__name__
    }
    missing = [
        f"{owner}.{name}" for owner, name in targets.values() if name not in vars(getattr(module, owner, object))
    ]
    if missing:
        raise PemaError(_version_message(module.__name__, missing))
    for target, (owner, name) in targets.items():
        _wrap(getattr(module, owner), name, wrappers[target])


def unpatch() -> None:
    """Undo every patch, latest first."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, *args)`; a static or class method stays one."""
    raw = owner.__dict__[name]
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
    original = raw.__func__ if kind else raw
    if getattr(original, "_pema", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._pema = True  # type: ignore[attr-defined]
    _originals.append((owner, name, raw))
    setattr(owner, name, kind(wrapped) if kind else wrapped)


def _version_message(module: str, missing: list[str]) -> str:
    found = " and ".join(f"{name} {_get_version(name)}" for name in ("adapters", "transformers"))
    return (
        f"pema_adapters does not work with {found}: {module} has no {', '.join(missing)}; install versions that it "
        "works with (pip install --upgrade pema-adapters)"
    )


def _get_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(version unknown)"
