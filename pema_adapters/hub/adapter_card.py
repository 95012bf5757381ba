"""Complete the model card that `push_adapter_to_hub` writes with the base, the trained rows, and how to load them."""

import shlex
from pathlib import Path

from pema_adapters.formats.delta import Delta, read_delta
from pema_adapters.hub.card import ADAPTERS_LIBRARY, README, decode_card, render_card
from pema_adapters.hub.provenance import find_hub_id, hub_link, render_provenance
from pema_adapters.io.escaping import escape_markdown, format_code_block, format_python_literal

_REPLACEMENTS = (
    ("pip install -U adapters\n", "pip install -U adapters pema-adapters\n"),
    ("from adapters import AutoAdapterModel\n", "import pema_adapters\nfrom adapters import AutoAdapterModel\n"),
)
"""Lines of the card by adapters that would not load the rows, and what replaces them."""


def add_pema_section(folder: Path, adapter_name: str, repo_id: str) -> None:
    """Add our section and metadata to the card that adapters wrote.

    Args:
        folder: Where the adapter and its card were just saved.
        adapter_name: The adapter.
        repo_id: The repository that the card will be pushed to.
    """
    delta = read_delta(folder, adapter_name)
    path = folder / README
    text = decode_card(path.read_bytes(), repo_id)
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    base = find_hub_id("", delta)
    metadata = {
        "library_name": ADAPTERS_LIBRARY,
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "tags": list(delta.methods),
    }
    card = render_card(text, repo_id, _render_section(delta, base, repo_id), metadata, {})
    path.write_text(card, encoding="utf-8")


def _render_section(delta: Delta, base: str | None, repo_id: str) -> str:
    methods = escape_markdown(", ".join(delta.methods))
    vocab_size = delta.fingerprint.vocab_size if delta.fingerprint else None
    of = f" of {vocab_size:,}" if vocab_size else ""
    of_base = f" of {hub_link(base)}" if base else ""
    loading = ["import pema_adapters", f"model.load_adapter({format_python_literal(repo_id)}, set_active=True)"]
    merging = shlex.join(["pema-merge", "--base", base or "BASE", "--delta", repo_id, "--output", "merged"])
    lines = [
        "## A partial embedding matrix",
        "",
        f"Methods: {methods}. {len(delta.token_ids):,}{of} embedding rows{of_base} were trained and are in this "
        "adapter; all other tokens keep the rows of the base.",
        "",
        "Load it:",
        "",
        *format_code_block(loading, "python"),
        "",
        "Or merge it into a full checkpoint:",
        "",
        *format_code_block([merging]),
        "",
    ]
    return "\n".join([*lines, *render_provenance(delta)])
