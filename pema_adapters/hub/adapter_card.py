"""The card of an artifact that `push_adapter_to_hub` pushes: adapters' own, with the base and the rows added."""

import shlex
from pathlib import Path

from pema_adapters.formats.delta import Delta, read_delta
from pema_adapters.hub.card import ADAPTERS_LIBRARY, README, decode_card, render_card
from pema_adapters.hub.provenance import find_hub_id, hub_link, methods_of, render_provenance
from pema_adapters.io.escaping import escape_markdown, format_code_block, format_python_literal

_REPLACEMENTS = (
    ("pip install -U adapters\n", "pip install -U adapters pema-adapters\n"),
    ("from adapters import AutoAdapterModel\n", "import pema_adapters\nfrom adapters import AutoAdapterModel\n"),
)
"""Lines of adapters' own card that would not load the rows."""


def add_pema_section(folder: Path, adapter_name: str, repo_id: str) -> None:
    """Complete the card that adapters wrote beside the adapter just saved in `folder`."""
    delta = read_delta(folder, adapter_name)
    path = folder / README
    text = decode_card(path.read_bytes(), repo_id)
    for theirs, ours in _REPLACEMENTS:
        text = text.replace(theirs, ours)
    base = find_hub_id("", delta)
    made = {
        "library_name": ADAPTERS_LIBRARY,
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "tags": methods_of(delta),
    }
    completed = render_card(text, repo_id, _render_section(delta, base, repo_id), made, {})
    path.write_text(completed, encoding="utf-8")


def _render_section(delta: Delta, base: str | None, repo_id: str) -> str:
    methods = escape_markdown(", ".join(methods_of(delta)))
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
        "Or make a complete checkpoint of it:",
        "",
        *format_code_block([merging]),
        "",
    ]
    return "\n".join([*lines, *render_provenance(delta)])
