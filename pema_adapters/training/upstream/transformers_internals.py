"""Private names of Transformers and accelerate, behind functions that say what they are used for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def ignore_unexpected_tensors(model: Any, names: list[str]) -> Iterator[None]:
    """Have `from_pretrained` skip, without a warning, checkpoint tensors that would get these names in the model."""
    before = model._keys_to_ignore_on_load_unexpected
    model._keys_to_ignore_on_load_unexpected = [*(before or []), *(f"^{re.escape(name)}$" for name in names)]
    try:
        yield
    finally:
        model._keys_to_ignore_on_load_unexpected = before


def resolve_load_dtype(model: Any, name: str, stored: Any, load_options: Mapping[str, Any]) -> Any:
    """Return the dtype that `from_pretrained` gives a parameter.

    Args:
        model: the model that is being loaded.
        name: the parameter.
        stored: its dtype in the checkpoint.
        load_options: the arguments of `_load_pretrained_model`.

    Returns:
        A torch dtype; None for a parameter that is quantised or distributed rather than cast.
    """
    import torch
    from transformers.modeling_utils import _infer_parameter_dtype

    quantizer = load_options.get("hf_quantizer")
    if load_options.get("device_mesh") is not None:
        return None
    if quantizer and quantizer.param_needs_quantization(model, name):
        return None
    tensor = torch.empty(0, dtype=stored, device="meta")
    keep_in_fp32 = load_options.get("keep_in_fp32_regex")
    return _infer_parameter_dtype(model, name, tensor, keep_in_fp32, quantizer)[1] or stored


def find_renamed_tensors(names: Iterable[str], key_mapping: Mapping[str, str] | None) -> dict[str, str]:
    """Apply the `key_mapping` of `from_pretrained` to tensor names.

    Returns:
        `{name in the checkpoint: name in the model}`, for the tensors whose name changes.
    """
    found = {}
    for name in names:
        for pattern, replacement in (key_mapping or {}).items():
            new, count = re.subn(pattern, replacement, name)
            if count:
                found[name] = new
                break
    return found


def pin_weight(module: Any, weight: Any) -> None:
    """Register `weight` and keep it: accelerate's offloading would swap it for stored values around each call."""
    hook = getattr(module, "_hf_hook", None)
    module.register_parameter("weight", weight)
    if not any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
        return
    from accelerate import hooks  # type: ignore[import-untyped]

    module._hf_hook = hooks.ModelHook()  # removing the offloading hook itself would restore its weights
    hooks.remove_hook_from_module(module)
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(weight.device))


def find_hub_kernel(config: Any) -> tuple[str, str] | None:
    """Find a config field that names an attention kernel on the Hub, in nested configs as well.

    Transformers below 5.3 reads these fields from config.json, and downloads and runs the kernel's code
    (CVE-2026-4372).

    Args:
        config: a dictionary or a `PretrainedConfig`.

    Returns:
        The first such field and its value; None if there is none.
    """
    for name, value in (config if isinstance(config, Mapping) else vars(config)).items():
        if str(name).lstrip("_").startswith("attn_implementation"):
            for each in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(each, str) and "/" in each:
                    return name, each
        is_config = isinstance(value, Mapping) or hasattr(value, "sub_configs")
        found = find_hub_kernel(value) if is_config else None
        if found is not None:
            return found
    return None


def mark_as_initialized(module: Any) -> None:
    """Keep Transformers from randomly initializing `module`, which would shift the random state of a new head."""
    module._is_hf_initialized = True


def get_commit_hash(model: Any) -> str | None:
    """Return the commit of the Hub repository that `model` was loaded from, None for a local folder."""
    return getattr(model.config, "_commit_hash", None)


def find_decayed_parameters(model: Any) -> set[str]:
    """Return the names of the parameters to which a Trainer applies weight decay."""
    from transformers import Trainer

    return set(Trainer.get_decay_parameter_names(None, model))
