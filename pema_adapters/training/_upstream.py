"""The only door to private names of adapters and transformers. `tests/training/test_upstream.py` is its contract.

`patch(module)` is called when one of their modules loads (see `pema_adapters/__init__.py`) and wraps what that module
defines; it does so once, and `unpatch()` puts every original back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

METHOD = "pema"

writing_trainer_checkpoint: ContextVar[bool] = ContextVar("writing_trainer_checkpoint", default=False)
"""True while a Trainer writes a checkpoint on the way: that holds K rows, a user's `save_pretrained` all V."""

_originals: list[tuple[Any, str, Any]] = []


def patch(module: ModuleType) -> None:
    """Wrap what `module` defines, once."""
    _PATCHES[module.__name__](module)


def unpatch() -> None:
    """Undo every patch, latest first."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, *args)`; a static method stays one."""
    raw = owner.__dict__[name]
    original = raw.__func__ if isinstance(raw, staticmethod) else raw
    if getattr(original, "_pema", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._pema = True  # type: ignore[attr-defined]
    _originals.append((owner, name, raw))
    setattr(owner, name, staticmethod(wrapped) if isinstance(raw, staticmethod) else wrapped)


# --- adapters: the method -----------------------------------------------------------------------------------------


def _patch_config(module: Any) -> None:
    from pema_adapters.training.config import PEMAConfig

    def get_config_class(original: Any, config_dict: Any) -> Any:
        return PEMAConfig if config_dict.get("architecture") == METHOD else original(config_dict)

    module.ADAPTER_CONFIG_MAP[METHOD] = PEMAConfig()
    _wrap(module.AdapterConfig, "_get_config_class", get_config_class)


def _patch_interface(module: Any) -> None:
    """Interface models list the methods they allow, and save that list: PEMA is allowed without being listed."""

    def get_from_config(original: Any, config: Any) -> list[str]:
        return [method for method in original(config) if method != METHOD]

    _wrap(module.AdapterMethod, "get_from_config", get_from_config)


def _patch_model_mixin(module: Any) -> None:
    def add_adapter_weights(original: Any, model: Any, adapter_name: str) -> Any:
        from pema_adapters.training.config import PEMAConfig
        from pema_adapters.training.layer import attach

        if model.adapters_config.match(adapter_name, PEMAConfig) is not None:
            attach(model.base_model)
        return original(model, adapter_name)

    def get_adapter(original: Any, model: Any, name: str) -> Any:
        """adapters looks for prompt tuning alone among the children of the base model."""
        found = original(model, name)
        rows = pema_layer(model).get_adapter(name) if pema_layer(model) else None
        if rows is not None:
            found.setdefault(-1, {})[METHOD] = rows
        return found

    def supports_adapter(original: Any, model: Any, type_or_config: Any) -> Any:
        named = isinstance(type_or_config, str) and type_or_config == METHOD
        return named or original(model, type_or_config)

    def adapter_summary(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The last row is the full model, so the rows that are on disk count, too."""
        layer = pema_layer(model)
        if layer is None:
            return original(model, *args, **kwargs)
        with layer.embedding.counting_absent_rows():
            return original(model, *args, **kwargs)

    _wrap(module.ModelAdaptersMixin, "_add_adapter_weights", add_adapter_weights)
    _wrap(module.ModelAdaptersMixin, "adapter_summary", adapter_summary)
    _wrap(module.ModelAdaptersMixin, "get_adapter", get_adapter)
    _wrap(module.ModelAdaptersMixin, "supports_adapter", supports_adapter)


def pema_layer(model: Any) -> Any:
    """The `PEMALayer` of a model, None where no adapter has PEMA."""
    return getattr(model.base_model, METHOD, None)


def has_adapters_support(model: Any) -> bool:
    """Whether `adapters.init` was called on the model (or it is an AutoAdapterModel)."""
    return hasattr(model, "adapters_config")


def adapter_tensor_names(model: Any) -> set[str]:
    """Names within the base model of all tensors that adapters added to it."""
    if not has_adapters_support(model):
        return set()
    from adapters.loading import AdapterLoader

    filters = [AdapterLoader(model).filter_func(name) for name in model.adapters_config.adapters]
    always = ("prompt_tuning.", "prefix_tuning.", "shared_parameters.", "invertible_adapters.", METHOD + ".")
    return {
        name
        for name in model.base_model.state_dict()
        if name.startswith(always) or any(matches("." + name) for matches in filters)
    }


def replace_adapter_config(model: Any, adapter_name: str, config: Any) -> None:
    """Give an adapter another config; its weights are the caller's affair."""
    del model.adapters_config.adapters[adapter_name]
    model.adapters_config.add(adapter_name, config=config)


# --- transformers: saving and resizing ----------------------------------------------------------------------------


def _patch_modeling_utils(module: Any) -> None:
    def save_pretrained(original: Any, model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from pema_adapters.training.saving import full_state_dict

        if writing_trainer_checkpoint.get():
            return original(model, save_directory, *args, **kwargs)
        with full_state_dict(model, Path(save_directory), kwargs.pop("state_dict", None)) as state_dict:
            return original(model, save_directory, *args, state_dict=state_dict, **kwargs)

    def resize_token_embeddings(
        original: Any, model: Any, new_num_tokens: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        from pema_adapters.training.surgery import refuse_resize

        refuse_resize(model, new_num_tokens)
        return original(model, new_num_tokens, *args, **kwargs)

    def tie_or_clone_weights(original: Any, model: Any, output_embeddings: Any, input_embeddings: Any) -> Any:
        from pema_adapters.training.surgery import refuse_tie

        refuse_tie(input_embeddings, output_embeddings)
        return original(model, output_embeddings, input_embeddings)

    _wrap(module.PreTrainedModel, "_tie_or_clone_weights", tie_or_clone_weights)
    _wrap(module.PreTrainedModel, "save_pretrained", save_pretrained)
    _wrap(module.PreTrainedModel, "resize_token_embeddings", resize_token_embeddings)


def _patch_trainer(module: Any) -> None:
    def save_checkpoint(original: Any, *args: Any, **kwargs: Any) -> Any:
        token = writing_trainer_checkpoint.set(True)
        try:
            return original(*args, **kwargs)
        finally:
            writing_trainer_checkpoint.reset(token)

    _wrap(module.Trainer, "_save_checkpoint", save_checkpoint)


_PATCHES: dict[str, Callable[[Any], None]] = {
    "adapters.configuration.adapter_config": _patch_config,
    "adapters.interface": _patch_interface,
    "adapters.model_mixin": _patch_model_mixin,
    "transformers.modeling_utils": _patch_modeling_utils,
    "transformers.trainer": _patch_trainer,
}
