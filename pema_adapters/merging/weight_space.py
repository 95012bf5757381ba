"""Weight-space methods of an adapter (LoRA, DoRA, (IA)^3, VeRA): what each says about one weight of the base.

adapters keeps them in the linear layers themselves: `<module>.loras.<name>.<part>`.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pema_adapters.errors import FormatError, MergeError
from pema_adapters.formats.artifact import Delta, Rest
from pema_adapters.formats.find import ADAPTER_CONFIG
from pema_adapters.formats.safetensors_file import FLOATS
from pema_adapters.formats.stored import Stored
from pema_adapters.merging.casting import wide

_PART = re.compile(r"(?P<module>.+)\.loras\.(?P<name>[^.]+)\.(?P<part>.+)")
_SHARED = re.compile(r"(?:.+\.)?shared_parameters\.(?P<name>[^.]+)\.(?P<part>lora_A|lora_B)")
_PARTS = {"lora_A", "lora_B", "vera_D", "vera_B", "m.weight"}


@dataclass(frozen=True)
class Adapted:
    """A linear layer that the adapter changes: `module` is its name, `method` the member of the configuration."""

    module: str
    method: dict[str, Any]
    parts: dict[str, Stored]

    @property
    def path(self) -> Path:
        """The file that says so."""
        return next(iter(self.parts.values())).path

    def values(self, part: str) -> np.ndarray:
        """The numbers of one part, float64 if stored so, else float32."""
        tensor = self.parts[part]
        return wide(np.frombuffer(tensor.read(), np.uint8), tensor.dtype).reshape(tensor.shape)


def weight_space(delta: Delta, fold: bool) -> tuple[list[Adapted], Rest]:
    """The layers to fold, and the adapter that remains without them.

    Methods that are not in weight space remain. Raises `MergeError` where nothing but a gated method is there: its
    gate depends on the input, so no weight can replace it.
    """
    members = _members(delta.rest)
    foldable = [member for member in members if member.get("architecture") == "lora"]
    if not fold or not foldable:
        return [], delta.rest
    if any(member.get("use_gating") for member in foldable):
        if len(foldable) < len(members):
            return [], delta.rest
        raise MergeError(
            f"{delta.folder}: adapter {delta.name!r} is gated (use_gating): its gate depends on the input, so it "
            "cannot be folded into weights; leave it an adapter beside the merged checkpoint with --no-fold"
        )
    return _layers(delta, foldable), _without(delta.rest, members, delta.name)


def _members(rest: Rest) -> list[dict[str, Any]]:
    method = rest.config.get("config") if rest.config else None
    members = method.get("configs") if isinstance(method, dict) and "configs" in method else [method]
    return [member for member in members if isinstance(member, dict)] if isinstance(members, list) else []


def _without(rest: Rest, members: list[dict[str, Any]], name: str) -> Rest:
    """The rest of an adapter whose weight-space members are folded; a union with one member left is that member."""
    left = [member for member in members if member.get("architecture") != "lora"]
    kept = {key: tensor for key, tensor in rest.tensors.items() if not _folds(key, name)}
    if kept and not left:
        path = next(iter(kept.values())).path
        raise FormatError(f"{path}: tensor {next(iter(kept))!r} is of no method that {ADAPTER_CONFIG} names")
    if not left or rest.config is None:
        return Rest(None, {})
    method = left[0] if len(left) == 1 else {**rest.config["config"], "configs": left}
    return replace(rest, config={**rest.config, "config": method}, tensors=kept)


def _folds(key: str, name: str) -> bool:
    found = _PART.fullmatch(key) or _SHARED.fullmatch(key)
    return found is not None and found["name"] == name


def _layers(delta: Delta, members: list[dict[str, Any]]) -> list[Adapted]:
    layers: dict[str, dict[str, Stored]] = {}
    shared: dict[str, Stored] = {}
    for key, tensor in delta.rest.tensors.items():
        if not _folds(key, delta.name):
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
        Adapted(module, _method(module, parts, members), parts | _needed(parts, shared))
        for module, parts in layers.items()
    ]


def _needed(parts: dict[str, Stored], shared: dict[str, Stored]) -> dict[str, Stored]:
    """VeRA's matrices A and B are one pair for all layers."""
    if "vera_D" not in parts:
        return {}
    if len(shared) < 2:
        path = parts["vera_D"].path
        raise FormatError(f"{path}: VeRA without its shared lora_A and lora_B; the artifact is not complete")
    return shared


def _method(module: str, parts: dict[str, Stored], members: list[dict[str, Any]]) -> dict[str, Any]:
    """The member that made these parts. Several that say the same about them are as good as one."""
    path = next(iter(parts.values())).path
    unknown = parts.keys() - _PARTS
    if unknown:
        raise FormatError(f"{path}: tensor {sorted(unknown)[0]!r} of {module!r} is of no method that can be folded")
    fitting = [member for member in members if _fits(parts, member)]
    said = {(_number(path, member, "alpha"), _number(path, member, "r")) for member in fitting}
    if len(said) != 1:
        what = "several members of the union that differ in alpha" if said else "no member of its configuration"
        raise MergeError(f"{path}: the parts of {module!r} fit {what}; leave them an adapter with --no-fold")
    return fitting[0]


def _fits(parts: dict[str, Stored], member: dict[str, Any]) -> bool:
    is_vera = isinstance(member.get("vera_d"), float) or isinstance(member.get("vera_b"), float)
    is_scale = member.get("composition_mode") == "scale"
    expected = {"vera_D", "vera_B"} if is_vera else {"lora_B"} if is_scale else {"lora_A", "lora_B"}
    expected |= {"m.weight"} if member.get("use_dora") else set()
    return parts.keys() == expected and parts["vera_D" if is_vera else "lora_B"].shape[-1:] == (member.get("r"),)


def _number(path: Path, member: dict[str, Any], key: str) -> float:
    value = member.get(key)
    if type(value) not in (int, float) or not 0 < float(value) < 1e12:  # type: ignore[arg-type]
        where = path.parent / ADAPTER_CONFIG
        raise FormatError(f"{where}: {key} is {str(value)[:40]!r}; expected a number above 0")
    return float(value)  # type: ignore[arg-type]
