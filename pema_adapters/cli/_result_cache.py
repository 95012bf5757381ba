"""Cache complete results of `pema-scan`, so that repeating a command loads neither libraries nor data.

Local tokenizers and models are identified by the state of their files, data by their content. Results with anything
from the Hub are not cached: there may be a newer version by now.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pema_adapters.scanning.cache.cached_scan import FORMAT, LIBRARIES, format_cache_note, open_cache
from pema_adapters.scanning.cache.content_key import compute_path_key, hash_json, read_folder_state

Metrics = list[dict[str, Any]]

UNRELATED_OPTIONS = {"json", "num_proc", "cache", "save", "plot"}
"""Options that do not affect the metrics."""


class ResultCache:
    """The cached result of one command, if it can be cached.

    Create it before scanning: its key is computed from the inputs now, so that later changes to them are noticed.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._store = open_cache()
        self._key = self._compute_key()

    def lookup(self) -> Metrics | None:
        """Return the cached metrics, None if there are none or if files are to be written, which need a scan."""
        wants_files = self._options.save or self._options.plot
        content = None if wants_files or self._key is None else self._store.read(f"answer-{self._key}")
        if content is None:
            return None
        metrics: Metrics = json.loads(content)
        for one in metrics:
            one["from_cache"] = True
            one["notes"] = [format_cache_note(str(self._store.folder))]
        return metrics

    def save(self, metrics: Metrics) -> None:
        """Cache the metrics, unless an input has changed in the meantime."""
        if self._key is not None and self._compute_key() == self._key:
            self._store.write(f"answer-{self._key}", json.dumps(metrics).encode())

    def _compute_key(self) -> str | None:
        """Hash everything that the metrics depend on; None if that is impossible or the cache is off."""
        asked = {name: value for name, value in vars(self._options).items() if name not in UNRELATED_OPTIONS}
        folders = [Path(name) for name in (*self._options.tokenizer, *self._options.model)]
        data = [Path(name) for name in self._options.data]
        if not self._options.cache or not all(path.exists() for path in (*folders, *data)):
            return None
        try:
            states = [read_folder_state(folder) for folder in folders]
            content = [compute_path_key(path, self._store) for path in data]
        except OSError:  # loading it will report why
            return None
        versions = [version(name) for name in ("pema-adapters", *LIBRARIES)]
        return None if None in states else hash_json([FORMAT, versions, asked, states, content])
