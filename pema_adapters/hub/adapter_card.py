"""The card of an artifact that `push_adapter_to_hub` pushes: adapters' own, with the base and the rows added."""

from pathlib import Path

from pema_adapters.formats.artifact import Delta, read_delta
from pema_adapters.hub.card import ADAPTERS_LIBRARY, README, written
from pema_adapters.hub.provenance import hub_id, methods_of, origin

_REPLACED = (
    ("pip install -U adapters\n", "pip install -U adapters pema-adapters\n"),
    ("from adapters import AutoAdapterModel\n", "import pema_adapters\nfrom adapters import AutoAdapterModel\n"),
)
"""Lines of adapters' own card that would not load the rows."""


def complete(folder: Path, adapter_name: str, repo_id: str) -> None:
    """Complete the card that adapters wrote beside the adapter just saved in `folder`."""
    delta = read_delta(folder, adapter_name)
    path = folder / README
    text = path.read_text()
    for theirs, ours in _REPLACED:
        text = text.replace(theirs, ours)
    base = hub_id("", delta.config)
    made = {
        "library_name": ADAPTERS_LIBRARY,
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "tags": methods_of(delta),
    }
    path.write_text(written(text, repo_id, _section(delta, base, repo_id), made, {}))


def _section(delta: Delta, base: str | None, repo_id: str) -> str:
    vocab_size = delta.fingerprint.vocab_size if delta.fingerprint else None
    of = f" of {vocab_size:,}" if vocab_size else ""
    of_base = f" of [{base}](https://huggingface.co/{base})" if base else ""
    lines = [
        "## A partial embedding matrix",
        "",
        f"Methods: {', '.join(methods_of(delta))}. {len(delta.token_ids):,}{of} embedding rows{of_base} were trained "
        "and are in this adapter; all other tokens keep the rows of the base.",
        "",
        "Load it:",
        "",
        "```python",
        "import pema_adapters",
        f'model.load_adapter("{repo_id}", set_active=True)',
        "```",
        "",
        "Or make a complete checkpoint of it:",
        "",
        "```",
        f"pema-merge --base {base or 'BASE'} --delta {repo_id} --output merged",
        "```",
        "",
    ]
    return "\n".join([*lines, *origin(delta)])
