"""Weight-space methods of an adapter (LoRA, DoRA, (IA)^3, VeRA): what each says about one weight of the base.

adapters keeps them in the linear layers themselves: `<module>.loras.<name>.<part>`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError, MergeError
from pema_adapters.formats.adapter_config import ADAPTER_CONFIG, AdapterConfig, Method
from pema_adapters.formats.delta import Delta, RemainingAdapter
from pema_adapters.formats.safetensors_header import FLOATS
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.merging.plan.dtype_cast import upcast

_PART = re.compile(r"(?P<module>.+)\.loras\.(?P<name>[^.]+)\.(?P<part>.+)")
_SHARED = re.compile(r"(?:.+\.)?shared_parameters\.(?P<name>[^.]+)\.(?P<part>lora_A|lora_B)")
_PARTS = {"lora_A", "lora_B", "vera_D", "vera_B", "m.weight"}


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer that the adapter changes: `module` is its name, `method` the settings of what changes it."""

    module: str
    method: Mapping[str, Any]
    parts: dict[str, StoredTensor]

    @property
    def path(self) -> Path:
        """The file that says so."""
        return next(iter(self.parts.values())).path

    def values(self, part: str) -> np.ndarray:
        """Return the numbers of one part, float64 if stored so, else float32."""
        tensor = self.parts[part]
        return upcast(np.frombuffer(tensor.read(), np.uint8), tensor.dtype).reshape(tensor.shape)


def find_adapted_layers(delta: Delta, fold: bool) -> tuple[list[AdaptedLinear], RemainingAdapter]:
    """Return the layers to fold, and the adapter that remains without them.

    Methods that are not in weight space remain. Raises `MergeError` where nothing but a gated method is there: its
    gate depends on the input, so no weight can replace it.
    """
    config = delta.remaining.config
    foldable = [method for method in config.methods if method.is_weight_space] if config else []
    if not fold or not foldable or config is None:
        return [], delta.remaining
    if any(method.is_gated for method in foldable):
        if len(foldable) < len(config.methods):
            return [], delta.remaining
        raise MergeError(
            f"{delta.folder}: adapter {delta.name!r} is gated (use_gating): its gate depends on the input, so it "
            "cannot be folded into weights; leave it an adapter beside the merged checkpoint with --no-fold"
        )
    return _layers(delta, foldable), _remaining_adapter(delta.remaining.tensors, config)


def _remaining_adapter(tensors: dict[str, StoredTensor], config: AdapterConfig) -> RemainingAdapter:
    """Return the rest of an adapter whose weight-space methods are folded."""
    left = config.without(lambda method: method.is_weight_space)
    kept = {key: tensor for key, tensor in tensors.items() if not _is_folded(key, config.name)}
    if kept and left is None:
        path = next(iter(kept.values())).path
        raise FormatError(f"{path}: tensor {next(iter(kept))!r} is of no method that {ADAPTER_CONFIG} names")
    return RemainingAdapter(None, {}) if left is None else RemainingAdapter(left, kept)


def _is_folded(key: str, name: str) -> bool:
    found = _PART.fullmatch(key) or _SHARED.fullmatch(key)
    return found is not None and found["name"] == name


def _layers(delta: Delta, methods: list[Method]) -> list[AdaptedLinear]:
    layers: dict[str, dict[str, StoredTensor]] = {}
    shared: dict[str, StoredTensor] = {}
    for key, tensor in delta.remaining.tensors.items():
        if not _is_folded(key, delta.name):
            continue
        if tensor.dtype not in FLOATS:
            raise FormatError(f"{tensor.path}: tensor {key!r} is {tensor.dtype}; expected floats")
        if found := _SHARED.fullmatch(key):
            shared["shared." + found["part"]] = tensor
        elif found := _PART.fullmatch(key):
            layers.setdefault(found["module"], {})[found["part"]] = tensor
    if not layers:
        raise FormatError(
            f"{delta.folder}: adapter {delta.name!r} names a weight-space method, but holds no tensor of it"
        )
    return [
        AdaptedLinear(module, _settings(module, parts, methods), parts | _check_parts(parts, shared))
        for module, parts in layers.items()
    ]


def _check_parts(parts: dict[str, StoredTensor], shared: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Check that VeRA's matrices A and B are one pair for all layers."""
    if "vera_D" not in parts:
        return {}
    if len(shared) < 2:
        path = parts["vera_D"].path
        raise FormatError(f"{path}: VeRA without its shared lora_A and lora_B; the artifact is not complete")
    return shared


def _settings(module: str, parts: dict[str, StoredTensor], methods: list[Method]) -> Mapping[str, Any]:
    """Return the settings of the method that made these parts; several methods may match if their settings agree."""
    path = next(iter(parts.values())).path
    unknown = parts.keys() - _PARTS
    if unknown:
        raise FormatError(f"{path}: tensor {sorted(unknown)[0]!r} of {module!r} is of no method that can be folded")
    fitting = [method.settings for method in methods if _is_complete(parts, method.settings)]
    said = {(_number(path, settings, "alpha"), _number(path, settings, "r")) for settings in fitting}
    if len(said) != 1:
        what = "several members of the union that differ in alpha" if said else "no member of its configuration"
        raise MergeError(f"{path}: the parts of {module!r} fit {what}; leave them an adapter with --no-fold")
    return fitting[0]


def _is_complete(parts: dict[str, StoredTensor], settings: Mapping[str, Any]) -> bool:
    is_vera = isinstance(settings.get("vera_d"), float) or isinstance(settings.get("vera_b"), float)
    is_scale = settings.get("composition_mode") == "scale"
    expected = {"vera_D", "vera_B"} if is_vera else {"lora_B"} if is_scale else {"lora_A", "lora_B"}
    expected |= {"m.weight"} if settings.get("use_dora") else set()
    return parts.keys() == expected and parts["vera_D" if is_vera else "lora_B"].shape[-1:] == (settings.get("r"),)


def _number(path: Path, settings: Mapping[str, Any], key: str) -> float:
    value = settings.get(key)
    if type(value) not in (int, float) or not 0 < float(value) < 1e12:  # type: ignore[arg-type]
        where = path.parent / ADAPTER_CONFIG
        raise FormatError(f"{where}: {key} is {str(value)[:40]!r}; expected a number above 0")
    return float(value)  # type: ignore[arg-type]
