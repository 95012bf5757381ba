"""modules.json of a Sentence Transformers model, which lists the folders of its modules."""

import json
from pathlib import Path

from pema_adapters.errors import reading
from pema_adapters.io.safe_paths import is_plain_name

MODULES = "modules.json"


def read_module_paths(path: Path) -> list[str]:
    """Return the folders that modules.json lists, except hidden ones (.git); [] if it is missing or malformed."""
    if not path.is_file():
        return []
    with reading(path):
        text = path.read_bytes()
    try:
        names = [str(module["path"]) for module in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    return [name for name in dict.fromkeys(names) if is_plain_name(name) and not name.startswith(".")]
