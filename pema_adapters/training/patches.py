"""PEMA as a method of adapters: what it does at each point where adapters and Transformers meet it.

`register(module)` runs when one of their modules is first imported, so nothing of theirs, nor of ours that stands on
it, is imported here before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pema_adapters.training.upstream import bug_fixes, import_hooks
from pema_adapters.training.upstream import private_names as _upstream


def register_on_import() -> None:
    """Call `register` for every module of theirs, when it is imported: for all of them, or for none.

    Raises: PemaError where a version of theirs lacks a function that PEMA takes part in.
    """
    try:
        for name in _upstream.MODULES:
            import_hooks.on_import(name, register)
    except BaseException:
        import_hooks.withdraw(_upstream.MODULES)
        _upstream.unpatch()
        raise


def register(module: ModuleType) -> None:
    """Take part in what `module` does."""
    _upstream.patch(module, _WRAPPERS)
    if module.__name__ == "adapters.configuration.adapter_config":
        from pema_adapters.training.method.config import PEMAConfig

        _upstream.add_config_string(_upstream.METHOD, PEMAConfig())


def _config_class(original: Callable[..., Any], config_dict: Any) -> Any:
    from pema_adapters.training.method.config import PEMAConfig

    return PEMAConfig if config_dict.get("architecture") == _upstream.METHOD else original(config_dict)


def _methods_of_config(original: Callable[..., Any], config: Any) -> list[str]:
    """Interface models list the methods they allow, and save that list: PEMA is allowed without being listed."""
    return [method for method in original(config) if method != _upstream.METHOD]


def _supports_adapter(original: Callable[..., Any], model: Any, type_or_config: Any) -> Any:
    named = isinstance(type_or_config, str) and type_or_config == _upstream.METHOD
    return named or original(model, type_or_config)


def _add_adapter_weights(original: Callable[..., Any], model: Any, adapter_name: str) -> Any:
    from pema_adapters.training.method.pema_layer import attach

    if _has_rows(model, adapter_name):
        attach(model.base_model)
        _convert_heads(model)
    return original(model, adapter_name)


def _add_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """The weights are the base model's affair, a head that shares its matrix is not."""
    result = original(model, *args, **kwargs)
    _convert_heads(model)
    return result


def _convert_heads(model: Any) -> None:
    layer = _upstream.pema_layer(model)
    if layer is not None:
        from pema_adapters.training.output.tied_head import convert_heads

        convert_heads(model, layer.embedding)


def _set_active_adapters(
    original: Callable[..., Any], model: Any, adapter_setup: Any, *args: Any, **kwargs: Any
) -> Any:
    """A token has one embedding: of adapters that are active together, one may have rows."""
    layer = _upstream.pema_layer(model)
    if layer is not None:
        layer.only_one(_upstream.flat_names(adapter_setup))
        for kind, names in _upstream.branches(adapter_setup):
            layer.refuse_branch(kind, names)
    return original(model, adapter_setup, *args, **kwargs)


def _get_adapter(original: Callable[..., Any], model: Any, name: str) -> Any:
    """adapters looks for prompt tuning alone among the children of the base model."""
    found, layer = original(model, name), _upstream.pema_layer(model)
    rows = None if layer is None else layer.get_adapter(name)
    if rows is not None:
        found.setdefault(-1, {})[_upstream.METHOD] = rows
    return found


def _merge_adapter(original: Callable[..., Any], model: Any, name: str) -> None:
    """adapters merges LoRA and its kin; the rows go into the embedding matrix as well."""
    from pema_adapters.training.method.merged_rows import check_merge, merge_rows
    from pema_adapters.training.upstream.merged_layers import merge_layers

    check_merge(model, name)
    merge_layers(original, model, name)
    merge_rows(model, name)


def _reset_adapter(original: Callable[..., Any], model: Any) -> None:
    from pema_adapters.training.method.merged_rows import reset_rows
    from pema_adapters.training.upstream.merged_layers import reset_layers

    reset_layers(original, model)
    reset_rows(model)


def _delete_adapter(original: Callable[..., Any], model: Any, adapter_name: str) -> Any:
    """Without the adapter, adapters could not take it out of the weights any more, and says KeyError."""
    layer = _upstream.pema_layer(model)
    if layer is not None and layer.merged is not None and layer.merged.adapter_name == adapter_name:
        layer.refuse_while_merged(f"delete_adapter({adapter_name!r})")
    return original(model, adapter_name)


def _save_adapter(
    original: Callable[..., Any], model: Any, save_directory: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    layer = _upstream.pema_layer(model)
    if layer is not None and not _upstream.saving_all_adapters.get():
        layer.refuse_unscanned(adapter_name)
    return original(model, save_directory, adapter_name, *args, **kwargs)


def _save_all_adapters(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _upstream.during(_upstream.saving_all_adapters):
        return original(*args, **kwargs)


def _adapter_summary(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """The last row is the full model, so the rows that are on disk count, too."""
    layer = _upstream.pema_layer(model)
    if layer is None:
        return original(model, *args, **kwargs)
    with layer.embedding.counting_absent_rows():
        return original(model, *args, **kwargs)


def _load_pretrained(original: Callable[..., Any], model_class: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    if _upstream.loading_without_matrix.get() is None:
        return original(model_class, model, *args, **kwargs)
    from pema_adapters.training.load_model import leaving_out_matrix

    with leaving_out_matrix(model, *args, **kwargs):
        return original(model_class, model, *args, **kwargs)


def _read_config(original: Callable[..., Any], config_class: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
    """A config.json that has `load_model` run code from the Hub is refused before anything is built."""
    found = original(config_class, name, *args, **kwargs)
    if _upstream.loading_without_matrix.get() is not None:
        from pema_adapters.training.guards import refuse_hub_kernel

        refuse_hub_kernel(found[0], f"{name}: config.json")
    return found


def _save_pretrained(original: Callable[..., Any], model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    from pema_adapters.training.save import full_state_dict, own_rows_once, warn_of_unmerged_rows

    if _upstream.writing_trainer_checkpoint.get():
        state = own_rows_once(model, kwargs.pop("state_dict", None))
        return original(model, save_directory, *args, state_dict=state, **kwargs)
    warn_of_unmerged_rows(model, save_directory)
    with full_state_dict(model, Path(save_directory), kwargs.pop("state_dict", None)) as state_dict:
        return original(model, save_directory, *args, state_dict=state_dict, **kwargs)


def _save_checkpoint(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _upstream.during(_upstream.writing_trainer_checkpoint):
        return original(*args, **kwargs)


def _resize_token_embeddings(
    original: Callable[..., Any], model: Any, new_num_tokens: Any = None, *args: Any, **kwargs: Any
) -> Any:
    from pema_adapters.training.guards import refuse_resize

    refuse_resize(model, new_num_tokens)
    return original(model, new_num_tokens, *args, **kwargs)


def _tie_weights(original: Callable[..., Any], model: Any, output_embeddings: Any, input_embeddings: Any) -> Any:
    from pema_adapters.training.guards import is_tied_already, refuse_tie

    if is_tied_already(input_embeddings, output_embeddings):
        return None
    refuse_tie(model, input_embeddings, output_embeddings)
    result = original(model, output_embeddings, input_embeddings)
    _convert_heads(model)
    return result


def _save_weights(original: Callable[..., Any], helper: Any, *args: Any, **kwargs: Any) -> Any:
    if not _upstream.pushing_rows.get():
        return original(helper, *args, **kwargs)
    with _upstream.as_safetensors(helper):
        return original(helper, *args, **kwargs)


def _load_weights(original: Callable[..., Any], helper: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """adapters reads safetensors only where it is told to, even if there is nothing else."""
    if not _upstream.lies_there_as_safetensors_alone(helper, save_directory):
        return original(helper, save_directory, *args, **kwargs)
    with _upstream.as_safetensors(helper):
        return original(helper, save_directory, *args, **kwargs)


def _push_adapter(original: Callable[..., Any], model: Any, repo_id: str, adapter: Any, *args: Any, **kw: Any) -> Any:
    names = [name for name in _upstream.flat_names(adapter) if _has_rows(model, name)]
    if not names:
        return original(model, repo_id, adapter, *args, **kw)
    for name in names:
        _upstream.pema_layer(model).refuse_unscanned(name)
    with _upstream.during(_upstream.pushing_rows):
        return original(model, repo_id, adapter, *args, **kw)


def _adapter_card(
    original: Callable[..., Any], model: Any, folder: str, adapter_name: str, repo_id: str, *args: Any, **kwargs: Any
) -> None:
    """adapters' own card names no base; one of rows without the base that they belong to is of no use."""
    original(model, folder, adapter_name, repo_id, *args, **kwargs)
    if _has_rows(model, adapter_name):
        from pema_adapters.hub.adapter_card import add_pema_section

        add_pema_section(Path(folder), adapter_name, repo_id)


def _has_rows(model: Any, adapter_name: str) -> bool:
    from pema_adapters.training.method.config import PEMAConfig

    return model.adapters_config.match(adapter_name, PEMAConfig) is not None


_WRAPPERS: dict[str, Callable[..., Any]] = {
    **bug_fixes.WRAPPERS,
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
