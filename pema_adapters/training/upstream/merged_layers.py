"""Fixes for `merge_adapter` and `reset_adapter` of adapters 1.3, so that a merged layer computes what it did before.

(IA)^3 and DoRA scale a layer's outputs, its bias included, but adapters merges the weight alone. DoRA's merge omits
`alpha / r`, and its reset leaves the merged weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pema_adapters.errors import SurgeryError
from pema_adapters.training.upstream.adapters_internals import (
    find_lora_layers,
    is_fused_projection,
    is_multi_task,
    provide_shared_parameters,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class UnmergedState:
    """A linear layer's weight [out, in] and bias [out] before a merge; None if adapters' own reset restores it."""

    weight: Tensor | None
    bias: Tensor | None


def merge_layers(original: Callable[..., Any], model: Any, adapter_name: str) -> None:
    """Merge an adapter into the linear layers as adapters does, then correct biases and DoRA's weights.

    Args:
        original: `merge_adapter` of adapters.
        model: changed in place.
        adapter_name: the adapter.

    Raises:
        SurgeryError: the adapter is multi-task LoRA, which has no single weight to merge.
    """
    import torch

    layers = [layer for layer in find_lora_layers(model) if adapter_name in layer.loras and not layer.merged]
    if any(is_multi_task(layer.loras[adapter_name]) for layer in layers):
        raise SurgeryError(f"adapter {adapter_name!r} is multi-task LoRA, which cannot be merged into one weight")
    original(model, adapter_name)
    with torch.no_grad(), provide_shared_parameters(model):
        for layer in layers:
            layer.unmerged = _correct_merge(layer, layer.loras[adapter_name])


def reset_layers(original: Callable[..., Any], model: Any) -> None:
    """Undo `merge_layers`; `original` is `reset_adapter` of adapters."""
    layers = [layer for layer in find_lora_layers(model) if layer.merged]
    original(model)
    for layer in layers:
        unmerged = layer.__dict__.pop("unmerged", UnmergedState(None, None))
        if unmerged.weight is not None:
            layer.weight.data = unmerged.weight
        if unmerged.bias is not None:
            layer.bias.data = unmerged.bias


def _correct_merge(layer: Any, lora: Any) -> UnmergedState:
    """Correct a layer that adapters has merged. Returns its state before the merge."""
    bias = None if layer.bias is None else layer.bias.data
    if lora.use_dora:
        weight, factor = lora.dora_w_o, _merge_dora(layer, lora)
    elif lora.composition_mode == "scale":
        weight, factor = None, lora.scaling * _get_scale(layer, lora)
    else:
        return UnmergedState(None, None)
    if bias is not None:
        layer.bias.data = (bias * factor).to(bias.dtype)
    return UnmergedState(weight, bias)


def _merge_dora(layer: Any, lora: Any) -> Tensor:
    """Merge DoRA with its scaling `alpha / r`. Returns the factor [out] of the layer's outputs."""
    import torch

    weight = lora.dora_w_o
    direction = torch.linalg.norm(weight + lora.delta_w, dim=1)
    factor: Tensor = lora.m.weight.view(-1) / direction
    layer.weight.data = (factor.unsqueeze(1) * (weight + lora.delta_w * lora.scaling)).to(weight.dtype)
    return factor


def _get_scale(layer: Any, lora: Any) -> Tensor:
    """Return the vector [out] of (IA)^3; 1 for those of a fused QKV projection that are not adapted."""
    vector = lora.lora_B.view(1, -1)
    scale: Tensor = layer.pad(vector, lora) if is_fused_projection(layer) else vector
    return scale.view(-1)
