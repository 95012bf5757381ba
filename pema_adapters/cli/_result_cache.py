"""Whole answers of `pema-scan`: the same question about the same files is answered without loading anything.

Tokenizers and models that lie here stand for themselves by the state of their files, data by their content. What comes
from the Hub may be another version there by now, so somebody has to ask.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pema_adapters.scanning.cache.cached_scan import FORMAT, LIBRARIES, format_cache_note, open_cache
from pema_adapters.scanning.cache.content_key import compute_path_key, hash_json, read_folder_state

Figures = list[dict[str, Any]]

NOT_FIGURES = {"json", "num_proc", "cache", "save", "plot"}
"""Options on which the figures do not depend."""


class ResultCache:
    """The answer to one question, if it can be remembered.

    Made before the answer is found, so that what changes meanwhile is not taken for what was read.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._store = open_cache()
        self._key = self._identity()

    def lookup(self) -> Figures | None:
        """The figures that were found before; none where files are to be written, which need more than figures."""
        wants_files = self._options.save or self._options.plot
        content = None if wants_files or self._key is None else self._store.read(f"answer-{self._key}")
        if content is None:
            return None
        figures: Figures = json.loads(content)
        for one in figures:
            one["from_cache"] = True
            one["notes"] = [format_cache_note(str(self._store.folder))]
        return figures

    def save(self, figures: Figures) -> None:
        """Keep the answer, unless a file has changed meanwhile."""
        if self._key is not None and self._identity() == self._key:
            self._store.write(f"answer-{self._key}", json.dumps(figures).encode())

    def _identity(self) -> str | None:
        """A sum of all that the figures depend on; None where that cannot be told, or is not to be."""
        asked = {name: value for name, value in vars(self._options).items() if name not in NOT_FIGURES}
        folders = [Path(name) for name in (*self._options.tokenizer, *self._options.model)]
        data = [Path(name) for name in self._options.data]
        if not self._options.cache or not all(path.exists() for path in (*folders, *data)):
            return None
        try:
            states = [read_folder_state(folder) for folder in folders]
            content = [compute_path_key(path, self._store) for path in data]
        except OSError:  # loading it says why
            return None
        versions = [version(name) for name in ("pema-adapters", *LIBRARIES)]
        return None if None in states else hash_json([FORMAT, versions, asked, states, content])
