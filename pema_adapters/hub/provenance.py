"""Provenance for model cards: the base, the methods, package versions, and the SHA-256 of the trained weights."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pema_adapters.formats.delta import ADAPTER_WEIGHTS, HEAD_WEIGHTS, Delta
from pema_adapters.hub.download import HUB_ID
from pema_adapters.io.digest import sha256_file
from pema_adapters.io.escaping import escape_markdown, format_code_span

PACKAGES = ("pema-adapters", "adapters", "transformers", "torch", "safetensors")


def find_hub_id(name: str, delta: Delta) -> str | None:
    """Return the Hub id of a base: `name` if it is one, else what the delta records; None for a local folder."""
    names = (found for found in (name, delta.recorded_base) if HUB_ID.fullmatch(found) and not Path(found).exists())
    return next(names, None)


def hash_weights(delta: Delta) -> Iterator[tuple[str, str]]:
    """Yield `(file name, SHA-256)` of each weights file of the delta."""
    wanted = ("*.safetensors", "*.bin") if delta.kind == "full" else (*ADAPTER_WEIGHTS, *HEAD_WEIGHTS)
    for path in sorted({path for pattern in wanted for path in delta.folder.glob(pattern) if path.is_file()}):
        yield path.name, sha256_file(path)


def format_versions() -> str:
    """Return a sentence with the versions of the packages that matter, as far as they are installed."""
    return f"Versions: {', '.join(filter(None, map(_format_version, PACKAGES)))}."


def _format_version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


def render_provenance(delta: Delta) -> list[str]:
    """Return the Markdown lines with versions and SHA-256 sums."""
    sums = [f"- {format_code_span(name)}: `{digest}`" for name, digest in hash_weights(delta)]
    return [format_versions(), "", "sha256 of the trained weights:", "", *sums]


def hub_link(repo_id: str) -> str:
    """Return a Markdown link to the page of a repository."""
    return f"[{escape_markdown(repo_id)}](https://huggingface.co/{repo_id})"
