"""Store the result of a scan, and the state of an interrupted one, in a `CacheFolder`."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pema_adapters.io.cache_folder import CacheFolder
from pema_adapters.scanning.bitmap import BitmapState
from pema_adapters.scanning.progress import ScanState
from pema_adapters.scanning.scanner import Scan

SECONDS_BETWEEN_WRITES = 10.0

Arrays = dict[str, npt.NDArray[Any]]


@dataclass
class ScanStore:
    """The entries of one scan in the cache; a `ResumeStore` for `scan_text`.

    Args:
        store: the cache.
        key: the hash of everything on which the result depends.
    """

    store: CacheFolder
    key: str
    _state: ScanState | None = field(default=None, init=False)
    _last_write: float = field(default_factory=time.monotonic, init=False)

    def lookup(self) -> Scan | None:
        """Return the stored result, or None."""
        entry = _read_entry(self.store, f"scan-{self.key}")
        if entry is None:
            return None
        header, arrays = entry
        token_ids = arrays["token_ids"].astype(np.intp)
        return Scan(token_ids, header["tokens"], tuple(header["columns"]), _unpack_points(arrays))

    def save_result(self, scan: Scan) -> None:
        """Store a result, and remove the state of the interrupted scan."""
        arrays: Arrays = {"token_ids": scan.token_ids.astype(np.int32), "growth": _pack_points(scan.growth)}
        _write_entry(self.store, f"scan-{self.key}", {"tokens": scan.tokens, "columns": scan.columns}, arrays)
        self.store.remove(f"partial-{self.key}")

    def load_state(self) -> ScanState | None:
        """Return the state of the interrupted scan, or None."""
        entry = _read_entry(self.store, f"partial-{self.key}")
        if entry is None:
            return None
        header, arrays = entry
        bitmap = BitmapState(arrays["seen"], header.pop("tokens"), _unpack_points(arrays))
        self._state = ScanState(bitmap=bitmap, columns=tuple(header.pop("columns")), **header)
        return self._state

    def save_state(self, state: ScanState) -> None:
        """Keep a state in memory; write it to disk every SECONDS_BETWEEN_WRITES."""
        self._state = state
        if time.monotonic() - self._last_write >= SECONDS_BETWEEN_WRITES:
            self._write_state(state)

    def handle_interrupt(self) -> None:
        """Write the last state.

        Raises:
            KeyboardInterrupt: the state is written; the message names the row from which the scan resumes.
        """
        if self._state is not None and self._write_state(self._state):
            raise KeyboardInterrupt(f"run the same command again to resume at row {self._state.rows:,}") from None

    def _write_state(self, state: ScanState) -> bool:
        header: dict[str, Any] = {"split": state.split, "steps": state.steps, "rows": state.rows}
        header |= {"columns": state.columns, "tokens": state.bitmap.tokens}
        arrays: Arrays = {"seen": state.bitmap.seen, "growth": _pack_points(state.bitmap.points)}
        self._last_write = time.monotonic()
        return _write_entry(self.store, f"partial-{self.key}", header, arrays)


def _read_entry(store: CacheFolder, name: str) -> tuple[dict[str, Any], Arrays] | None:
    from safetensors.numpy import load

    content = store.read(name)
    if content is None:
        return None
    header, _, arrays = content.partition(b"\n")
    return json.loads(header), load(arrays)


def _write_entry(store: CacheFolder, name: str, header: dict[str, Any], arrays: Arrays) -> bool:
    """Write an entry: one line of JSON, then safetensors."""
    from safetensors.numpy import save

    return store.write(name, json.dumps(header).encode() + b"\n" + save(arrays))


def _pack_points(points: tuple[tuple[int, int], ...]) -> npt.NDArray[np.int64]:
    return np.array(points, dtype=np.int64).reshape(-1, 2)


def _unpack_points(arrays: Arrays) -> tuple[tuple[int, int], ...]:
    return tuple((tokens, distinct) for tokens, distinct in arrays["growth"].tolist())
