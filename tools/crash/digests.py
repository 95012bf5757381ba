"""Digests of files that ignore what differs from one run to the next."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

MARKER = "pema_merge.json"
"""The report that a merge leaves in its output."""
VARYING = ("seconds", "output", "base", "delta", "mtime_ns", "sha256", "sums")
"""Keys of reports and journals that differ from run to run."""


def digest_file(path: Path) -> str:
    """Return the digest of a file; of a report or a journal without its varying keys."""
    data = path.read_bytes()
    if path.name in (MARKER, "journal.json"):
        with suppress(ValueError):
            data = json.dumps(_without_varying(json.loads(data))).encode()
    return hashlib.blake2b(data).hexdigest()[:16]


def _without_varying(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {key: _without_varying(content[key]) for key in sorted(content) if key not in VARYING}
