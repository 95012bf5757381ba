"""The lines of Python that load a merged checkpoint, and what stays an adapter beside it."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pema_adapters.formats.adapter_config import ADAPTER_CONFIG
from pema_adapters.formats.artifact import HEAD_CONFIG


def loading_lines(
    checkpoint: str, config: Mapping[str, Any], left: Mapping[str, Collection[str]], where: Callable[[str], str] = repr
) -> list[str]:
    """The lines behind the imports.

    Args:
        checkpoint: folder or Hub id of the merged checkpoint.
        config: its config.json.
        left: the names of the files in the folder of each adapter that is left.
        where: a Python expression for the folder of an adapter.
    """
    if any(HEAD_CONFIG in files for files in left.values()):
        lines = [f'model = adapters.AutoAdapterModel.from_pretrained("{checkpoint}")']
    else:
        start = "; adapters.init(model)" if left else ""
        lines = [f'model = transformers.{model_class(config)}.from_pretrained("{checkpoint}"){start}']
    for name, files in left.items():
        load, active = ("adapter", "set_active=True, ") if ADAPTER_CONFIG in files else ("head", "")
        lines.append(f"model.load_{load}({where(name)}, {active}use_safetensors=True)")
    return lines


def model_class(config: Mapping[str, Any]) -> str:
    """The Transformers class that config.json names; AutoModel where it names none."""
    found = config.get("architectures")
    name = found[0] if isinstance(found, list) and found else None
    return name if isinstance(name, str) and name.isascii() and name.isidentifier() else "AutoModel"
