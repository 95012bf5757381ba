"""The lines of Python that load a merged checkpoint, and what stays an adapter beside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema_adapters.formats.adapter_config import ADAPTER_CONFIG, AdapterConfig
from pema_adapters.formats.delta import HEAD_CONFIG
from pema_adapters.formats.json_object import decode_json
from pema_adapters.io.escaping import format_python_literal
from pema_adapters.merging.heads.registry import is_language_model

_FLEXIBLE = "AdapterModel"


@dataclass(frozen=True)
class RemainingAdapterFiles:
    """What lies in `adapters/NAME`: the `config` of its methods, None where a flexible head is all there is."""

    config: AdapterConfig | None
    has_head: bool

    @classmethod
    def read(cls, read_file: Callable[[str], bytes | None]) -> "RemainingAdapterFiles":
        """Read its files by `read_file`, which gives None for one that is not there."""
        path, found = Path(ADAPTER_CONFIG), read_file(ADAPTER_CONFIG)
        config = None if found is None else AdapterConfig.parse(decode_json(found, path), path)
        return cls(config, read_file(HEAD_CONFIG) is not None)

    @property
    def is_inverted(self) -> bool:
        """Whether the language-model head that it was trained with undid its invertible part: flexible heads do."""
        if self.config is None or not str(self.config.content.get("model_class")).endswith(_FLEXIBLE):
            return False
        return any(method.is_invertible for method in self.config.methods)


def load_snippet(
    checkpoint: str,
    config: Mapping[str, Any],
    left: Mapping[str, RemainingAdapterFiles],
    where: Callable[[str], str] = format_python_literal,
) -> list[str]:
    """Return the lines after the imports.

    Args:
        checkpoint: folder or Hub id of the merged checkpoint.
        config: its config.json.
        left: the adapters that are left, by name.
        where: a Python expression for the folder of an adapter.
    """
    name, is_lm = format_python_literal(checkpoint), is_language_model(model_class(config))
    if any(adapter.has_head or (adapter.is_inverted and is_lm) for adapter in left.values()):
        lines = [f"model = adapters.AutoAdapterModel.from_pretrained({name})"]
    else:
        start = "; adapters.init(model)" if left else ""
        lines = [f"model = transformers.{model_class(config)}.from_pretrained({name}){start}"]
    for adapter_name, adapter in left.items():
        load, active = ("head", "") if adapter.config is None else ("adapter", "set_active=True, ")
        lines.append(f"model.load_{load}({where(adapter_name)}, {active}use_safetensors=True)")
    return lines


def model_class(config: Mapping[str, Any]) -> str:
    """Return the Transformers class that config.json names; AutoModel where it names none."""
    found = config.get("architectures")
    name = found[0] if isinstance(found, list) and found else None
    return name if isinstance(name, str) and name.isascii() and name.isidentifier() else "AutoModel"
