"""Fixes for `merge_adapter` and `reset_adapter` of adapters 1.3, so that a merged layer computes what it did before.

(IA)^3 and DoRA scale a layer's outputs, its bias included, but adapters merges the weight alone. DoRA's merge forgets
`alpha / r`, and its reset leaves the merged weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pema_adapters.errors import SurgeryError
from pema_adapters.training.upstream import private_names as _upstream


@dataclass
class Unmerged:
    """What a linear layer was before a merge; None for what `reset_adapter` of adapters brings back itself."""

    weight: Tensor | None
    bias: Tensor | None


def merge_layers(original: Callable[..., Any], model: Any, adapter_name: str) -> None:
    """Merge an adapter into the linear layers as adapters does, then correct biases and DoRA's weights.

    Raises:
        SurgeryError: multi-task LoRA, which has no single weight to merge.
    """
    layers = [layer for layer in _upstream.lora_layers(model) if adapter_name in layer.loras and not layer.merged]
    for layer in layers:
        if _upstream.is_multi_task(layer.loras[adapter_name]):
            raise SurgeryError(f"adapter {adapter_name!r} is multi-task LoRA, which cannot be merged into one weight")
    original(model, adapter_name)
    with torch.no_grad(), _upstream.shared_parameters(model):
        for layer in layers:
            layer.unmerged = _complete(layer, layer.loras[adapter_name])


def reset_layers(original: Callable[..., Any], model: Any) -> None:
    """Undo `merge_layers`."""
    layers = [layer for layer in _upstream.lora_layers(model) if layer.merged]
    original(model)
    for layer in layers:
        unmerged = layer.__dict__.pop("unmerged", Unmerged(None, None))
        if unmerged.weight is not None:
            layer.weight.data = unmerged.weight
        if unmerged.bias is not None:
            layer.bias.data = unmerged.bias


def _complete(layer: Any, lora: Any) -> Unmerged:
    """Correct a layer that adapters has merged. Returns its state before the merge."""
    bias = None if layer.bias is None else layer.bias.data
    if lora.use_dora:
        weight = lora.dora_w_o
        direction = torch.linalg.norm(weight + lora.delta_w, dim=1)
        factor = lora.m.weight.view(-1) / direction
        layer.weight.data = (factor.unsqueeze(1) * (weight + lora.delta_w * lora.scaling)).to(weight.dtype)
    elif lora.composition_mode == "scale":
        weight, factor = None, lora.scaling * _scale(layer, lora)
    else:
        return Unmerged(None, None)
    if bias is not None:
        layer.bias.data = (bias * factor).to(bias.dtype)
    return Unmerged(weight, bias)


def _scale(layer: Any, lora: Any) -> Tensor:
    """(IA)^3's vector [out]; in a projection of q, k and v together, 1 for those that are not adapted."""
    vector = lora.lora_B.view(1, -1)
    scale: Tensor = layer.pad(vector, lora) if _upstream.is_merged_projection(layer) else vector
    return scale.view(-1)
