"""What PEMA does at each patched function of adapters and Transformers; a wrapper has the name of its patch target.

`register(module)` runs when a module of theirs is first imported. So this module imports nothing of theirs, nor of ours
that depends on it, outside of functions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pema_adapters.training import upstream


def register_on_import() -> None:
    """Have `register` called for every patched module when it is imported: for all of them, or for none.

    Raises:
        PemaError: a module that is loaded already lacks a patch target, so its version is not supported.
    """
    try:
        for name in upstream.PATCHED_MODULES:
            upstream.on_import(name, register)
    except BaseException:
        upstream.cancel(upstream.PATCHED_MODULES)
        upstream.unpatch()
        raise


def register(module: ModuleType) -> None:
    """Patch `module`; with adapters' configs, make "pema" a name for `PEMAConfig()`."""
    upstream.patch(module, WRAPPERS)
    if module.__name__ == "adapters.configuration.adapter_config":
        from pema_adapters.training.method.config import PEMAConfig

        upstream.register_config_name(upstream.METHOD, PEMAConfig())


def _config_class(original: Callable[..., Any], config_dict: Any) -> Any:
    from pema_adapters.training.method.config import PEMAConfig

    return PEMAConfig if config_dict.get("architecture") == upstream.METHOD else original(config_dict)


def _methods_of_config(original: Callable[..., Any], config: Any) -> list[str]:
    """Allow PEMA on interface models, which list the methods they allow, without changing the list they save."""
    return [method for method in original(config) if method != upstream.METHOD]


def _supports_adapter(original: Callable[..., Any], model: Any, type_or_config: Any) -> Any:
    named = isinstance(type_or_config, str) and type_or_config == upstream.METHOD
    return named or original(model, type_or_config)


def _add_adapter_weights(original: Callable[..., Any], model: Any, adapter_name: str) -> Any:
    from pema_adapters.training.method.pema_layer import attach_pema_layer

    if _has_rows(model, adapter_name):
        attach_pema_layer(model.base_model)
        _convert_heads(model)
    return original(model, adapter_name)


def _add_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Convert tied heads as well: adapters adds weights to the base model, which has no head."""
    result = original(model, *args, **kwargs)
    _convert_heads(model)
    return result


def _convert_heads(model: Any) -> None:
    layer = upstream.pema_layer(model)
    if layer is not None:
        from pema_adapters.training.output.tied_head import convert_heads

        convert_heads(model, layer.embedding)


def _set_active_adapters(
    original: Callable[..., Any], model: Any, adapter_setup: Any, *args: Any, **kwargs: Any
) -> Any:
    """Refuse two active adapters with rows, and one with rows in a parallel block: a token has one embedding."""
    layer = upstream.pema_layer(model)
    if layer is not None:
        layer.require_single(upstream.flatten_setup(adapter_setup))
        for kind, names in upstream.find_parallel_blocks(adapter_setup):
            layer.reject_parallel(kind, names)
    return original(model, adapter_setup, *args, **kwargs)


def _get_adapter(original: Callable[..., Any], model: Any, name: str) -> Any:
    """Include the rows: among the base model's children, adapters looks for prompt tuning alone."""
    found, layer = original(model, name), upstream.pema_layer(model)
    rows = None if layer is None else layer.get_adapter(name)
    if rows is not None:
        found.setdefault(-1, {})[upstream.METHOD] = rows
    return found


def _merge_adapter(original: Callable[..., Any], model: Any, name: str) -> None:
    """Merge the rows into the embedding matrix, beside LoRA and its relatives."""
    from pema_adapters.training.method.merged_rows import check_merge, merge_rows

    check_merge(model, name)
    upstream.merge_layers(original, model, name)
    merge_rows(model, name)


def _reset_adapter(original: Callable[..., Any], model: Any) -> None:
    from pema_adapters.training.method.merged_rows import reset_rows

    upstream.reset_layers(original, model)
    reset_rows(model)


def _delete_adapter(original: Callable[..., Any], model: Any, adapter_name: str) -> Any:
    """Refuse to delete a merged adapter: adapters could no longer subtract it from the weights."""
    layer = upstream.pema_layer(model)
    if layer is not None and layer.merged is not None and layer.merged.adapter_name == adapter_name:
        layer.refuse_while_merged(f"delete_adapter({adapter_name!r})")
    return original(model, adapter_name)


def _save_adapter(
    original: Callable[..., Any], model: Any, save_directory: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    layer = upstream.pema_layer(model)
    if layer is not None and not upstream.saving_all_adapters.get():
        layer.refuse_unscanned(adapter_name)
    return original(model, save_directory, adapter_name, *args, **kwargs)


def _save_all_adapters(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with upstream.override(upstream.saving_all_adapters):
        return original(*args, **kwargs)


def _adapter_summary(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Count the rows that are on disk in the line for the full model."""
    layer = upstream.pema_layer(model)
    if layer is None:
        return original(model, *args, **kwargs)
    with layer.embedding.count_absent_rows():
        return original(model, *args, **kwargs)


def _load_pretrained(original: Callable[..., Any], model_class: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    if upstream.deferred_matrices.get() is None:
        return original(model_class, model, *args, **kwargs)
    from pema_adapters.training.load_model import defer_matrix

    with defer_matrix(model, *args, **kwargs):
        return original(model_class, model, *args, **kwargs)


def _read_config(original: Callable[..., Any], config_class: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a config.json that would have `load_model` run code from the Hub, before anything is built."""
    found = original(config_class, name, *args, **kwargs)
    if upstream.deferred_matrices.get() is not None:
        from pema_adapters.training.guards import refuse_hub_kernel

        refuse_hub_kernel(found[0], f"{name}: config.json")
    return found


def _save_pretrained(original: Callable[..., Any], model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    from pema_adapters.training.save import build_full_state_dict, drop_duplicate_rows, warn_of_unmerged_rows

    if upstream.writing_trainer_checkpoint.get():
        state = drop_duplicate_rows(model, kwargs.pop("state_dict", None))
        return original(model, save_directory, *args, state_dict=state, **kwargs)
    warn_of_unmerged_rows(model, save_directory)
    with build_full_state_dict(model, Path(save_directory), kwargs.pop("state_dict", None)) as state_dict:
        return original(model, save_directory, *args, state_dict=state_dict, **kwargs)


def _save_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with upstream.override(upstream.writing_trainer_checkpoint):
        return original(*args, **kwargs)


def _resize_token_embeddings(
    original: Callable[..., Any], model: Any, new_num_tokens: Any = None, *args: Any, **kwargs: Any
) -> Any:
    from pema_adapters.training.guards import refuse_resize

    refuse_resize(model, new_num_tokens)
    return original(model, new_num_tokens, *args, **kwargs)


def _tie_weights(original: Callable[..., Any], model: Any, output_embeddings: Any, input_embeddings: Any) -> Any:
    from pema_adapters.training.guards import is_tied, refuse_tie

    if is_tied(input_embeddings, output_embeddings):
        return None
    refuse_tie(model, input_embeddings, output_embeddings)
    result = original(model, output_embeddings, input_embeddings)
    _convert_heads(model)
    return result


def _save_weights(original: Callable[..., Any], helper: Any, *args: Any, **kwargs: Any) -> Any:
    if not upstream.pushing_rows.get():
        return original(helper, *args, **kwargs)
    with upstream.use_safetensors_format(helper):
        return original(helper, *args, **kwargs)


def _load_weights(original: Callable[..., Any], helper: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Read safetensors where there is no pickle: adapters would do so only with `use_safetensors=True`."""
    if not upstream.has_only_safetensors(helper, save_directory):
        return original(helper, save_directory, *args, **kwargs)
    with upstream.use_safetensors_format(helper):
        return original(helper, save_directory, *args, **kwargs)


def _push_adapter(original: Callable[..., Any], model: Any, repo_id: str, adapter: Any, *args: Any, **kw: Any) -> Any:
    names = [name for name in upstream.flatten_setup(adapter) if _has_rows(model, name)]
    if not names:
        return original(model, repo_id, adapter, *args, **kw)
    for name in names:
        upstream.pema_layer(model).refuse_unscanned(name)
    with upstream.override(upstream.pushing_rows):
        return original(model, repo_id, adapter, *args, **kw)


def _adapter_card(
    original: Callable[..., Any], model: Any, folder: str, adapter_name: str, repo_id: str, *args: Any, **kwargs: Any
) -> None:
    """Name the base in the card: rows are of no use without the base they belong to."""
    original(model, folder, adapter_name, repo_id, *args, **kwargs)
    if _has_rows(model, adapter_name):
        from pema_adapters.hub.adapter_card import add_pema_section

        add_pema_section(Path(folder), adapter_name, repo_id)


def _has_rows(model: Any, adapter_name: str) -> bool:
    from pema_adapters.training.method.config import PEMAConfig

    return model.adapters_config.match(adapter_name, PEMAConfig) is not None


WRAPPERS: dict[str, Callable[..., Any]] = {
    **upstream.BUG_FIXES,
    "config_class": _config_class,
    "methods_of_config": _methods_of_config,
    "add_adapter": _add_adapter,
    "add_adapter_weights": _add_adapter_weights,
    "set_active_adapters": _set_active_adapters,
    "get_adapter": _get_adapter,
    "supports_adapter": _supports_adapter,
    "merge_adapter": _merge_adapter,
    "reset_adapter": _reset_adapter,
    "delete_adapter": _delete_adapter,
    "save_adapter": _save_adapter,
    "save_all_adapters": _save_all_adapters,
    "save_all_adapters_and_heads": _save_all_adapters,
    "adapter_summary": _adapter_summary,
    "load_pretrained": _load_pretrained,
    "read_config": _read_config,
    "save_pretrained": _save_pretrained,
    "resize_token_embeddings": _resize_token_embeddings,
    "tie_weights": _tie_weights,
    "save_checkpoint": _save_checkpoint,
    "save_weights": _save_weights,
    "load_weights": _load_weights,
    "push_adapter": _push_adapter,
    "push_adapter_setup": _push_adapter,
    "adapter_card": _adapter_card,
}
