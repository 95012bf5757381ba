"""The only door to private names of adapters and transformers.

Its contract is tests/training/upstream/test_contract.py.

`POINTS` are the functions of theirs that PEMA takes part in; what it does there is in `method.py`. `patch` wraps those
of one module, once, and `unpatch` puts every original back.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from pema_adapters.errors import PemaError

METHOD = "pema"

POINTS = {
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
    "wrap_merged_projection": ("adapters.methods.lora", "LoRAMergedLinear", "wrap"),
    "push_adapter": ("adapters.hub_mixin", "PushAdapterToHubMixin", "push_adapter_to_hub"),
    "push_adapter_setup": ("adapters.hub_mixin", "PushAdapterToHubMixin", "push_adapter_setup_to_hub"),
    "adapter_card": ("adapters.hub_mixin", "PushAdapterToHubMixin", "_save_adapter_card"),
}
"""Point: module, class, function."""

ADDED = ("prompt_tuning.", "prefix_tuning.", "shared_parameters.", "invertible_adapters.", METHOD + ".")
"""Children of the base model (of both, where it is made of two) that adapters adds."""

MODULES = tuple(dict.fromkeys(module for module, _, _ in POINTS.values()))

writing_trainer_checkpoint: ContextVar[bool] = ContextVar("writing_trainer_checkpoint", default=False)
"""True while a Trainer writes a checkpoint on the way: that holds K rows, a user's `save_pretrained` all V."""

loading_without_matrix: ContextVar[list[Any] | None] = ContextVar("loading_without_matrix", default=None)
"""A list while `load_model` builds a model whose embedding matrix is never allocated: of what was left out."""

saving_all_adapters: ContextVar[bool] = ContextVar("saving_all_adapters", default=False)
"""True while all adapters of a model are saved, as a Trainer does: those that have not begun to train as well."""

pushing_rows: ContextVar[bool] = ContextVar("pushing_rows", default=False)
"""True while an adapter with PEMA goes to the Hub: as safetensors, which adapters itself cannot be told."""


@contextmanager
def during(variable: ContextVar[Any], value: Any = True) -> Iterator[Any]:
    """Have `variable` true, or another `value`, in the block."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


_originals: list[tuple[Any, str, Any]] = []


def patch(module: ModuleType, wrappers: Mapping[str, Callable[..., Any]]) -> None:
    """Wrap the points in `module`, all or none; a wrapper is called with the original and its arguments.

    Raises: PemaError where a point is missing, which is another version's.
    """
    points = {point: (owner, name) for point, (where, owner, name) in POINTS.items() if where == module.__name__}
    missing = [f"{owner}.{name}" for owner, name in points.values() if name not in vars(getattr(module, owner, object))]
    if missing:
        raise PemaError(_version_error(module.__name__, missing))
    for point, (owner, name) in points.items():
        _wrap(getattr(module, owner), name, wrappers[point])


def _version_error(module: str, missing: list[str]) -> str:
    found = " and ".join(f"{name} {_version(name)}" for name in ("adapters", "transformers"))
    return (
        f"pema_adapters does not work with {found}: {module} has no {', '.join(missing)}; install versions that it "
        "works with (pip install --upgrade pema-adapters)"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(version unknown)"


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


@contextmanager
def as_safetensors(helper: Any) -> Iterator[None]:
    """Have a `WeightsLoaderHelper` read and write safetensors in the block."""
    before, helper.use_safetensors = helper.use_safetensors, True
    try:
        yield
    finally:
        helper.use_safetensors = before


def lies_there_as_safetensors_alone(helper: Any, folder: str | Path) -> bool:
    """Whether the weights that a `WeightsLoaderHelper` is to read are there in that format and in no other."""
    there = [Path(folder, name).exists() for name in (helper.weights_name, helper.safe_weights_name)]
    return there == [False, True]


def flat_names(adapter_setup: Any) -> list[str]:
    """The names of the adapters in a setup: a name, or a composition of several."""
    from adapters.composition import AdapterCompositionBlock, parse_composition

    found = parse_composition(adapter_setup)
    return list(found.flatten()) if isinstance(found, AdapterCompositionBlock) else []


def branches(adapter_setup: Any) -> Iterator[tuple[str, list[str]]]:
    """Every block of a setup that sends inputs through some of its adapters only: its kind, and all their names."""
    from adapters.composition import AdapterCompositionBlock, BatchSplit, MultiTask, Parallel, Split, parse_composition

    def walk(block: Any) -> Iterator[tuple[str, list[str]]]:
        if isinstance(block, AdapterCompositionBlock):
            if isinstance(block, (BatchSplit, MultiTask, Parallel, Split)) and len(block.children) > 1:
                yield type(block).__name__, sorted(block.flatten())
            for child in block.children:
                yield from walk(child)

    return walk(parse_composition(adapter_setup))


@contextmanager
def expecting_no_tensor(model: Any, names: list[str]) -> Iterator[None]:
    """Have `from_pretrained` pass over tensors of the checkpoint that would have these names in the model."""
    before = model._keys_to_ignore_on_load_unexpected
    model._keys_to_ignore_on_load_unexpected = [*(before or []), *(f"^{re.escape(name)}$" for name in names)]
    try:
        yield
    finally:
        model._keys_to_ignore_on_load_unexpected = before


def dtype_to_load(model: Any, name: str, stored: Any, how: Mapping[str, Any]) -> Any:
    """The dtype that `from_pretrained` gives the parameter `name`, of dtype `stored` in the checkpoint.

    `how` are the arguments of `_load_pretrained_model`. None for what is not simply cast: quantised, or distributed.
    """
    import torch
    from transformers.modeling_utils import _infer_parameter_dtype

    quantizer = how.get("hf_quantizer")
    if how.get("device_mesh") is not None or (quantizer and quantizer.param_needs_quantization(model, name)):
        return None
    tensor = torch.empty(0, dtype=stored, device="meta")
    return _infer_parameter_dtype(model, name, tensor, how.get("keep_in_fp32_regex"), quantizer)[1] or stored


def renamed_on_load(names: Iterable[str], key_mapping: Mapping[str, str] | None) -> dict[str, str]:
    """`{name in the checkpoint: name in the model}` of the tensors that a `key_mapping` of from_pretrained renames."""
    found = {}
    for name in names:
        for pattern, replacement in (key_mapping or {}).items():
            new, count = re.subn(pattern, replacement, name)
            if count:
                found[name] = new
                break
    return found


def keep_loaded(module: Any, weight: Any) -> None:
    """Let a module keep `weight`, though accelerate would load one from elsewhere for each call, and drop it."""
    hook = getattr(module, "_hf_hook", None)
    module.register_parameter("weight", weight)
    if not any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
        return
    from accelerate import hooks  # type: ignore[import-untyped]

    module._hf_hook = hooks.ModelHook()  # the other, removed, would bring its weights back
    hooks.remove_hook_from_module(module)
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(weight.device))


def lora_layers(model: Any) -> list[Any]:
    """The linear layers that LoRA, DoRA, (IA)^3 and VeRA may change."""
    from adapters.methods.lora import LoRALayer

    return [module for module in model.modules() if isinstance(module, LoRALayer)]


def is_multi_task(lora: Any) -> bool:
    """Whether the part of an adapter in a linear layer is multi-task LoRA."""
    from adapters.methods.lora import MTLLoRA

    return isinstance(lora, MTLLoRA)


def is_merged_projection(layer: Any) -> bool:
    """Whether a linear layer is the projection of q, k and v together."""
    from adapters.methods.lora import LoRAMergedLinear

    return isinstance(layer, LoRAMergedLinear)


@contextmanager
def shared_parameters(model: Any) -> Iterator[None]:
    """Make the parameters that all layers share (VeRA's) available during the block, as in a forward."""
    import torch
    from adapters.context import ForwardContext

    with ForwardContext(model, torch.empty(0, 1)):
        ForwardContext.get_context().shared_parameters = model.base_model.shared_parameters
        yield


def prefix_pools(model: Any) -> list[tuple[Any, Any]]:
    """Every layer of prefix tuning, and the pool that it is linked to."""
    from adapters.methods.prefix_tuning import PrefixTuningLayer

    return [(module, module.pool) for module in model.modules() if isinstance(module, PrefixTuningLayer)]


def find_hub_kernel(config: Any) -> tuple[str, str] | None:
    """The first field of a config, or of one within it, that names an attention kernel on the Hub; and its value.

    Transformers below 5.3 takes these fields from a config.json, and downloads and runs the kernel's code
    (CVE-2026-4372). config: as a dictionary, or a `PretrainedConfig`.
    """
    for name, value in (config if isinstance(config, Mapping) else vars(config)).items():
        if str(name).lstrip("_").startswith("attn_implementation"):
            for one in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(one, str) and "/" in one:
                    return name, one
        is_config = isinstance(value, Mapping) or hasattr(value, "sub_configs")
        found = find_hub_kernel(value) if is_config else None
        if found is not None:
            return found
    return None


def mark_as_initialized(module: Any) -> None:
    """Have Transformers draw no random weights for `module`."""
    module._is_hf_initialized = True


def commit_of(model: Any) -> str | None:
    """The commit of the Hub repository that `model` was loaded from."""
    return getattr(model.config, "_commit_hash", None)


def add_config_string(name: str, config: Any) -> None:
    """Let `name` stand for `config` in `add_adapter(..., config=name)`."""
    from adapters.configuration.adapter_config import ADAPTER_CONFIG_MAP

    ADAPTER_CONFIG_MAP[name] = config


def pema_layer(model: Any) -> Any:
    """The `PEMALayer` of a model, None where no adapter has PEMA."""
    return getattr(model.base_model, METHOD, None)


def add_child(base_model: Any, layer: Any) -> None:
    """Make a `PEMALayer` a child of its model, one that adapters knows of.

    It passes over the children of a model that is made of two (EncoderDecoderModel), which has none of its own.
    """
    base_model.add_module(METHOD, layer)
    base_model.add_base_adapters = True


def remove_child(base_model: Any) -> None:
    """Undo `add_child`."""
    delattr(base_model, METHOD)
    base_model.__dict__.pop("add_base_adapters")


def has_adapters_support(model: Any) -> bool:
    """Whether `adapters.init` was called on the model (or it is an AutoAdapterModel)."""
    return hasattr(model, "adapters_config")


def decayed_parameter_names(model: Any) -> set[str]:
    """The names of the parameters to which a Trainer applies weight decay."""
    from transformers import Trainer

    return set(Trainer.get_decay_parameter_names(None, model))


def has_flexible_heads(model: Any) -> bool:
    """Whether the model is an AutoAdapterModel, whose checkpoints bring their adapters back."""
    from adapters.heads import ModelWithFlexibleHeadsAdaptersMixin

    return isinstance(model, ModelWithFlexibleHeadsAdaptersMixin)


def adapter_tensor_names(model: Any) -> set[str]:
    """Names within the base model of all tensors that adapters added to it."""
    if not has_adapters_support(model):
        return set()
    from adapters.loading import AdapterLoader

    filters = [AdapterLoader(model).filter_func(name) for name in model.adapters_config.adapters]
    return {
        name
        for name in model.base_model.state_dict()
        if any("." + child in "." + name for child in ADDED) or any(matches("." + name) for matches in filters)
    }


def replace_adapter_config(model: Any, adapter_name: str, config: Any) -> None:
    """Give an adapter another config; its weights are the caller's affair."""
    del model.adapters_config.adapters[adapter_name]
    model.adapters_config.add(adapter_name, config=config)
