"""Private and undocumented names of adapters, behind functions that say what they are used for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

METHOD = "pema"
"""PEMA's name among the methods of adapters, and that of its layer in the base model."""

ADAPTER_PREFIXES = ("prompt_tuning.", "prefix_tuning.", "shared_parameters.", "invertible_adapters.", METHOD + ".")
"""Prefixes of tensors that adapters adds as children of the base model (of both, in an EncoderDecoderModel)."""


def has_adapters_support(model: Any) -> bool:
    """Return whether `adapters.init` was called on the model (or it is an AutoAdapterModel)."""
    return hasattr(model, "adapters_config")


def has_flexible_heads(model: Any) -> bool:
    """Return whether the model is an AutoAdapterModel, whose checkpoints restore their adapters."""
    from adapters.heads import ModelWithFlexibleHeadsAdaptersMixin

    return isinstance(model, ModelWithFlexibleHeadsAdaptersMixin)


def register_config_name(name: str, config: Any) -> None:
    """Let `add_adapter(..., config=name)` mean `config`."""
    from adapters.configuration.adapter_config import ADAPTER_CONFIG_MAP

    ADAPTER_CONFIG_MAP[name] = config


def replace_adapter_config(model: Any, adapter_name: str, config: Any) -> None:
    """Give an adapter another config; its weights are left to the caller."""
    del model.adapters_config.adapters[adapter_name]
    model.adapters_config.add(adapter_name, config=config)


def pema_layer(model: Any) -> Any:
    """Return the `PEMALayer` of a model, None if no adapter has PEMA."""
    return getattr(model.base_model, METHOD, None)


def add_child(base_model: Any, layer: Any) -> None:
    """Add a `PEMALayer` to its model, as a child that adapters manages.

    `add_base_adapters` makes adapters visit it: an EncoderDecoderModel has no such children of its own.
    """
    base_model.add_module(METHOD, layer)
    base_model.add_base_adapters = True


def remove_child(base_model: Any) -> None:
    """Undo `add_child`."""
    delattr(base_model, METHOD)
    base_model.__dict__.pop("add_base_adapters")


def flatten_setup(adapter_setup: Any) -> list[str]:
    """Return the adapter names in a setup: a name, or a composition of several."""
    from adapters.composition import AdapterCompositionBlock, parse_composition

    found = parse_composition(adapter_setup)
    return list(found.flatten()) if isinstance(found, AdapterCompositionBlock) else []


def find_parallel_blocks(adapter_setup: Any) -> Iterator[tuple[str, list[str]]]:
    """Find the blocks of a setup in which an adapter sees a part of the batch only.

    Yields:
        The kind of the block ("Parallel", say) and the names of all adapters in it.
    """
    from adapters.composition import AdapterCompositionBlock, BatchSplit, MultiTask, Parallel, Split, parse_composition

    def walk(block: Any) -> Iterator[tuple[str, list[str]]]:
        if isinstance(block, AdapterCompositionBlock):
            if isinstance(block, (BatchSplit, MultiTask, Parallel, Split)) and len(block.children) > 1:
                yield type(block).__name__, sorted(block.flatten())
            for child in block.children:
                yield from walk(child)

    return walk(parse_composition(adapter_setup))


def find_adapter_tensors(model: Any) -> set[str]:
    """Return the names, within the base model, of all tensors that adapters added to it."""
    if not has_adapters_support(model):
        return set()
    from adapters.loading import AdapterLoader

    filters = [AdapterLoader(model).filter_func(name) for name in model.adapters_config.adapters]
    return {
        name
        for name in model.base_model.state_dict()
        if any("." + prefix in "." + name for prefix in ADAPTER_PREFIXES)
        or any(matches("." + name) for matches in filters)
    }


def find_lora_layers(model: Any) -> list[Any]:
    """Return the linear layers that LoRA, DoRA, (IA)^3 and VeRA can change."""
    from adapters.methods.lora import LoRALayer

    return [module for module in model.modules() if isinstance(module, LoRALayer)]


def is_multi_task(lora: Any) -> bool:
    """Return whether an adapter's part in a linear layer is multi-task LoRA."""
    from adapters.methods.lora import MTLLoRA

    return isinstance(lora, MTLLoRA)


def is_fused_projection(layer: Any) -> bool:
    """Return whether a linear layer is a fused QKV projection."""
    from adapters.methods.lora import LoRAMergedLinear

    return isinstance(layer, LoRAMergedLinear)


@contextmanager
def provide_shared_parameters(model: Any) -> Iterator[None]:
    """Make the parameters that all layers share (VeRA's) available in the block, as in a forward."""
    import torch
    from adapters.context import ForwardContext

    with ForwardContext(model, torch.empty(0, 1)):
        ForwardContext.get_context().shared_parameters = model.base_model.shared_parameters
        yield


def find_prefix_pools(model: Any) -> list[tuple[Any, Any]]:
    """Return every prefix-tuning layer with the pool that it is linked to."""
    from adapters.methods.prefix_tuning import PrefixTuningLayer

    return [(module, module.pool) for module in model.modules() if isinstance(module, PrefixTuningLayer)]


@contextmanager
def use_safetensors_format(helper: Any) -> Iterator[None]:
    """Have a `WeightsLoaderHelper` read and write safetensors in the block."""
    before, helper.use_safetensors = helper.use_safetensors, True
    try:
        yield
    finally:
        helper.use_safetensors = before


def has_only_safetensors(helper: Any, folder: str | Path) -> bool:
    """Return whether `folder` has the weights of a `WeightsLoaderHelper` as safetensors and not as a pickle."""
    found = [Path(folder, name).exists() for name in (helper.weights_name, helper.safe_weights_name)]
    return found == [False, True]
