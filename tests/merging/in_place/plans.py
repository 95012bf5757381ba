"""A base of a few files, plans for merging into it, and what its folder holds."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from pema_adapters.io.input_file import InputFile
from pema_adapters.merging.in_place import undo_journal
from pema_adapters.merging.in_place.execute import (
    InPlaceMerge,
    merge_in_place,
)
from pema_adapters.merging.plan.dtype_cast import Rounding
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import BytesSegment, CopySegment, RowsSegment

A, B = "model-1.safetensors", "model-2.safetensors"
CONFIG, README, NEW = "config.json", "README.md", "adapters/task/adapter_config.json"
IDS = np.array([0, 3, 4, 9, 30])


@dataclass(frozen=True)
class Doubled:
    """Bytes of the base times 2, computed as they are read, as folded weights are."""

    origin: CopySegment

    @property
    def length(self):
        return self.origin.length

    def read(self, begin, end):
        return bytes(byte * 2 % 256 for byte in self.origin.read(begin, end))

    def changes(self):
        for begin in range(0, self.length, 8):
            yield begin, self.read(begin, min(begin + 8, self.length))


def plan_of(*files):
    return SimpleNamespace(files=files, rounding=Rounding(), size=sum(file.size for file in files))


def file_a(base, ids=IDS):
    matrix = RowsSegment(
        CopySegment(InputFile(base / A), 20, 32 * 8), BytesSegment(np.random.default_rng(1).bytes(len(ids) * 8)), ids, 8
    )
    return PlannedFile(
        A, (BytesSegment((base / A).read_bytes()[:20]), matrix, CopySegment(InputFile(base / A), 276, 5))
    )


def plan_for(base):
    """Rows in one file, tensors in the other, a file replaced, one made in new folders, one carried."""
    return plan_of(
        PlannedFile(README, (CopySegment(InputFile(base / README), 0, 5),)),
        file_a(base),
        PlannedFile(B, (CopySegment(InputFile(base / B), 0, 8), BytesSegment(bytes(30)), Doubled(CopySegment(InputFile(base / B), 38, 16)), CopySegment(InputFile(base / B), 54, 10))),
        PlannedFile(CONFIG, (BytesSegment(b'{"a": 1}'),)),
        PlannedFile(NEW, (BytesSegment(b"new"),)),
    )  # fmt: skip


def run(base, plan=None, verify=False):
    return merge_in_place(InPlaceMerge(plan or plan_for(base), base, report={"delta": "d"}), verify, lambda count: None)


def content(folder):
    """Names and bytes of everything."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def visible(folder):
    return {name: data for name, data in content(folder).items() if not name.startswith(undo_journal.JOURNAL_DIR)}
