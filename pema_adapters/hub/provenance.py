"""What a card says about where something comes from: its base, methods, versions, and the sums of its files."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pema_adapters.formats.delta import ADAPTER_WEIGHTS, HEAD_WEIGHTS, Delta
from pema_adapters.hub.download import HUB_ID
from pema_adapters.io.digest import sha256_file
from pema_adapters.io.escaping import escape_markdown, format_code_span

PACKAGES = ("pema-adapters", "adapters", "transformers", "torch", "safetensors")


def find_hub_id(name: str, delta: Delta) -> str | None:
    """The base as the Hub knows it: by the name given, or by what the delta says; None for a folder nobody knows."""
    names = (found for found in (name, delta.recorded_base) if HUB_ID.fullmatch(found) and not Path(found).exists())
    return next(names, None)


def hash_weights(delta: Delta) -> Iterator[tuple[str, str]]:
    """`(file, sha256)` of the weights of the delta."""
    wanted = ("*.safetensors", "*.bin") if delta.kind == "full" else (*ADAPTER_WEIGHTS, *HEAD_WEIGHTS)
    for path in sorted({path for pattern in wanted for path in delta.folder.glob(pattern) if path.is_file()}):
        yield path.name, sha256_file(path)


def methods_of(delta: Delta) -> list[str]:
    """The delta's methods by name: `["pema", "lora"]`; full fine-tuning has rows alone."""
    return list(delta.methods)


def format_versions() -> str:
    """The installed versions of the packages that matter; a merge needs few of them."""
    return f"Versions: {', '.join(filter(None, map(_format_version, PACKAGES)))}."


def _format_version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def render_provenance(delta: Delta) -> list[str]:
    """The lines that tell versions and sums."""
    sums = [f"- {format_code_span(name)}: `{digest}`" for name, digest in hash_weights(delta)]
    return [format_versions(), "", "sha256 of the trained weights:", "", *sums]


def hub_link(repo_id: str) -> str:
    """A Markdown link to the page of a repository."""
    return f"[{escape_markdown(repo_id)}](https://huggingface.co/{repo_id})"
