"""What a card says about where something comes from: its base, methods, versions, and the sums of its files."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pema_adapters.formats.artifact import ADAPTER_WEIGHTS, HEAD_WEIGHTS, Delta
from pema_adapters.formats.methods import method_names
from pema_adapters.merging.plan import PlannedFile
from pema_adapters.merging.segments import Copy

PACKAGES = ("pema-adapters", "adapters", "transformers", "torch", "safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def hub_id(name: str, config: Mapping[str, Any]) -> str | None:
    """The base as the Hub knows it: by the name given, or by what the delta says; None for a folder nobody knows."""
    for found in (name, config.get("model_name"), config.get("_name_or_path")):
        if isinstance(found, str) and _HUB_ID.fullmatch(found) and not Path(found).exists():
            return found
    return None


def sha256_of(delta: Delta) -> Iterator[tuple[str, str]]:
    """`(file, sha256)` of the weights of the delta."""
    wanted = ("*.safetensors", "*.bin") if delta.kind == "full" else (*ADAPTER_WEIGHTS, *HEAD_WEIGHTS)
    for path in sorted({path for pattern in wanted for path in delta.folder.glob(pattern) if path.is_file()}):
        digest = hashlib.sha256()
        for _, data in PlannedFile(path.name, (Copy(path, 0, path.stat().st_size),)).chunks():
            digest.update(data)
        yield path.name, digest.hexdigest()


def methods_of(delta: Delta) -> list[str]:
    """The delta's methods by name: `["pema", "lora"]`; full fine-tuning has rows alone."""
    return method_names(delta.config.get("config")) if delta.kind == "adapter" else ["pema"]


def origin(delta: Delta) -> list[str]:
    """The lines that tell versions and sums."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    sums = [f"- `{name}`: `{digest}`" for name, digest in sha256_of(delta)]
    return [f"Versions: {packages}.", "", "sha256 of the trained weights:", "", *sums]
