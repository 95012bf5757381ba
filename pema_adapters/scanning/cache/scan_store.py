"""What earlier scans found, and how far interrupted ones came, as entries of a `Store`."""

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
    """One scan, by the sum of all that it depends on. Also what `scan_text` takes to resume."""

    store: CacheFolder
    key: str
    _state: ScanState | None = field(default=None, init=False)
    _written: float = field(default_factory=time.monotonic, init=False)

    def lookup(self) -> Scan | None:
        """What the same scan found before."""
        found = _read_entry(self.store, f"scan-{self.key}")
        if found is None:
            return None
        facts, arrays = found
        return Scan(
            arrays["token_ids"].astype(np.intp), facts["tokens"], tuple(facts["columns"]), _unpack_points(arrays)
        )

    def save_result(self, scan: Scan) -> None:
        """Remember a result, and forget the way there."""
        arrays: Arrays = {"token_ids": scan.token_ids.astype(np.int32), "growth": _pack_points(scan.growth)}
        _write_entry(self.store, f"scan-{self.key}", {"tokens": scan.tokens, "columns": scan.columns}, arrays)
        self.store.remove(f"partial-{self.key}")

    def load_state(self) -> ScanState | None:
        """Where the same scan was interrupted."""
        found = _read_entry(self.store, f"partial-{self.key}")
        if found is None:
            return None
        facts, arrays = found
        grown = BitmapState(arrays["seen"], facts.pop("tokens"), _unpack_points(arrays))
        self._state = ScanState(bitmap=grown, columns=tuple(facts.pop("columns")), **facts)
        return self._state

    def save_state(self, state: ScanState) -> None:
        """Take over a state; write it when the last one on the disk is old."""
        self._state = state
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._write_state(state)

    def handle_interrupt(self) -> None:
        """Write the last state.

        Raises:
            KeyboardInterrupt: that the scan can go on from there; its message says so.
        """
        if self._state is not None and self._write_state(self._state):
            raise KeyboardInterrupt(f"the same command goes on from row {self._state.rows:,}") from None

    def _write_state(self, state: ScanState) -> bool:
        facts: dict[str, Any] = {"split": state.split, "steps": state.steps, "rows": state.rows}
        facts |= {"columns": state.columns, "tokens": state.bitmap.tokens}
        arrays: Arrays = {"seen": state.bitmap.seen, "growth": _pack_points(state.bitmap.points)}
        self._written = time.monotonic()
        return _write_entry(self.store, f"partial-{self.key}", facts, arrays)


def _read_entry(store: CacheFolder, name: str) -> tuple[dict[str, Any], Arrays] | None:
    from safetensors.numpy import load

    content = store.read(name)
    if content is None:
        return None
    facts, _, arrays = content.partition(b"\n")
    return json.loads(facts), load(arrays)


def _write_entry(store: CacheFolder, name: str, facts: dict[str, Any], arrays: Arrays) -> bool:
    from safetensors.numpy import save

    return store.write(name, json.dumps(facts).encode() + b"\n" + save(arrays))


def _pack_points(points: tuple[tuple[int, int], ...]) -> npt.NDArray[np.int64]:
    return np.array(points, dtype=np.int64).reshape(-1, 2)


def _unpack_points(arrays: Arrays) -> tuple[tuple[int, int], ...]:
    return tuple((tokens, distinct) for tokens, distinct in arrays["growth"].tolist())
