"""What the methods in an adapter_config.json are called, for people."""

from typing import Any


def method_names(config: Any) -> list[str]:
    """The methods of an adapter, by the names that adapters has for them: `["pema", "compacter"]`.

    `config`: what adapter_config.json holds under "config", one method or a union; anything else has no methods.
    """
    members = config.get("configs") if isinstance(config, dict) else None
    listed = members if isinstance(members, list) else [config]
    return [_name(member) for member in listed if isinstance(member, dict)]


def _name(member: dict[str, Any]) -> str:
    architecture = member.get("architecture")
    if architecture is None:
        return "compacter" if member.get("phm_layer") else "bottleneck"
    if architecture != "lora":
        return str(architecture)
    if member.get("composition_mode") == "scale":
        return "ia3"
    is_dora, is_vera = bool(member.get("use_dora") or member.get("dora")), member.get("vera_d") is not None
    return ("dvora" if is_dora else "vera") if is_vera else "dora" if is_dora else "lora"
