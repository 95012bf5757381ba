"""What a card says about where something comes from: its base, methods, versions, and the sums of its files."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pema_adapters.files import sum_of_file
from pema_adapters.formats.artifact import ADAPTER_WEIGHTS, HEAD_WEIGHTS, Delta
from pema_adapters.merging.resolve import HUB_ID

PACKAGES = ("pema-adapters", "adapters", "transformers", "torch", "safetensors")


def hub_id(name: str, config: Mapping[str, Any]) -> str | None:
    """The base as the Hub knows it: by the name given, or by what the delta says; None for a folder nobody knows."""
    for found in (name, config.get("model_name"), config.get("_name_or_path")):
        if isinstance(found, str) and HUB_ID.fullmatch(found) and not Path(found).exists():
            return found
    return None


def sha256_of(delta: Delta) -> Iterator[tuple[str, str]]:
    """`(file, sha256)` of the weights of the delta."""
    wanted = ("*.safetensors", "*.bin") if delta.kind == "full" else (*ADAPTER_WEIGHTS, *HEAD_WEIGHTS)
    for path in sorted({path for pattern in wanted for path in delta.folder.glob(pattern) if path.is_file()}):
        yield path.name, sum_of_file(path)


def methods_of(delta: Delta) -> list[str]:
    """The delta's methods by name: `["pema", "lora"]`; full fine-tuning has rows alone."""
    return list(delta.methods)


def origin(delta: Delta) -> list[str]:
    """The lines that tell versions and sums."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    sums = [f"- `{name}`: `{digest}`" for name, digest in sha256_of(delta)]
    return [f"Versions: {packages}.", "", "sha256 of the trained weights:", "", *sums]
