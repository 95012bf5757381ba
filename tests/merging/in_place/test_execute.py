"""A merge in place gives what a written merge gives; whatever happens on the way, the base is whole or comes back."""

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import MergeError
from pema_adapters.io.input_file import InputFile
from pema_adapters.merging.in_place import change_set, undo_data, undo_journal
from pema_adapters.merging.in_place.change_set import plan_changes
from pema_adapters.merging.in_place.execute import (
    InPlaceMerge,
    check_in_place,
    merge_in_place,
    roll_back_interrupted,
    undo,
)
from pema_adapters.merging.output.writer import write_plan
from pema_adapters.merging.plan.dtype_cast import Rounding
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import BytesSegment, CastSegment, CopySegment, RowsSegment

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


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for name, size in ((A, 20 + 32 * 8 + 5), (B, 64)):
        (folder / name).write_bytes(np.random.default_rng(size).bytes(size))
    (folder / CONFIG).write_text("{}")
    (folder / CONFIG).chmod(0o640)
    (folder / README).write_text("hello")
    return folder


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


@pytest.fixture
def merged(base, tmp_path):
    (tmp_path / "written").mkdir()
    write_plan(plan_for(base), tmp_path / "written", lambda count: None)
    return content(tmp_path / "written")


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("chunk", [7, 4 << 20])
def test_as_written_and_back(base, merged, monkeypatch, verify, chunk):
    monkeypatch.setattr(undo_data, "CHUNK", chunk)
    before, plan, heard = content(base), plan_for(base), []
    stats = (base / CONFIG).stat(), (base / A).stat().st_ino
    written = merge_in_place(InPlaceMerge(plan, base, report={"delta": "d"}), verify, heard.append)
    assert written == len(IDS) * 8 + 46 + 8 + 3
    assert sum(heard) == plan.size * (1 + verify)
    assert visible(base) == merged
    assert ((base / CONFIG).stat().st_mode, (base / A).stat().st_ino) == (stats[0].st_mode, stats[1])
    assert (base / undo_journal.JOURNAL_DIR / "undo.bin").stat().st_size == len(IDS) * 8 + 46
    assert not roll_back_interrupted(base)
    assert undo(base) == {"delta": "d", "bytes_written": written, "max_rounding_error": 0.0}
    assert content(base) == before
    assert (base / CONFIG).stat().st_mtime_ns == stats[0].st_mtime_ns
    with pytest.raises(MergeError, match=r"base: nothing to undo \(it holds no .pema-undo\)"):
        undo(base)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_real_merge(make_base, make_adapter, tmp_path, shards):
    base = make_base(shards=shards)
    delta, before = make_adapter(base).folder, content(base.folder)
    merge_checkpoint(base.folder, delta, tmp_path / "out")
    report = merge_checkpoint(base.folder, delta, in_place=True, verify=True)
    assert report.bytes_written == 6 * 4 * 4
    written = content(tmp_path / "out")
    assert visible(base.folder) == {name: written[name] for name in before}
    undo(base.folder)
    assert content(base.folder) == before


def test_what_is_as_planned_is_not_touched(base):
    found = plan_changes(plan_for(base), base)
    assert found.patched[A].tolist() == [[20, 8], [20 + 24, 16], [20 + 72, 8], [20 + 240, 8]]
    assert found.patched[B].tolist() == [[8, 46]]
    assert [file.name for file in found.replaced + found.created] == [CONFIG, NEW]
    plan = plan_of(
        PlannedFile(B, (BytesSegment((base / B).read_bytes()),)), PlannedFile(CONFIG, (BytesSegment(b"{}"),))
    )
    before = (base / B).stat().st_mtime_ns
    assert run(base, plan) == 0
    assert (base / B).stat().st_mtime_ns == before


STEPS = [(os, name) for name in ("pwrite", "fsync", "fdatasync", "utime", "unlink", "rmdir")]
STEPS += [(Path, name) for name in ("replace", "unlink", "mkdir", "rmdir")]


def killed_at(number, action):
    """Run `action` in a child that dies before its `number`-th step. Returns whether it ended before that."""
    child = os.fork()
    if not child:
        left = [number]

        def counted(original):
            def call(*args, **kwargs):
                left[0] -= 1
                return original(*args, **kwargs) if left[0] else os._exit(9)

            return call

        try:
            for owner, name in STEPS:
                setattr(owner, name, counted(getattr(owner, name)))
            action()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


def test_killed_at_every_step(base, merged):
    before, number, seen = content(base), 1, set()
    while not killed_at(number, lambda: run(base)):
        rolled_back, done = roll_back_interrupted(base), (base / undo_journal.JOURNAL_DIR).exists()
        seen.add((rolled_back, done))
        if done:
            assert visible(base) == merged
            undo(base)
        assert content(base) == before
        number += 1
    assert visible(base) == merged
    assert seen == {(False, False), (True, False), (False, True)}
    assert number > 30


@pytest.mark.parametrize("back", [roll_back_interrupted, undo])
def test_killed_at_every_step_back(base, monkeypatch, back):
    """An undo, or a rollback, that is cut off is finished by the next one."""
    before, number = content(base), 1
    if back is roll_back_interrupted:
        monkeypatch.setattr(undo_journal, "mark_done", lambda *args: None)  # as if cut off at the end
    run(base)
    while not killed_at(number, lambda: back(base)):
        if not roll_back_interrupted(base) and (base / undo_journal.JOURNAL_DIR).exists():
            undo(base)
        assert content(base) == before
        run(base)
        number += 1
    assert content(base) == before
    assert number > 20


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("count", range(1, 18, 4))
def test_failures_are_rolled_back_at_once(base, merged, monkeypatch, error, count):
    before, calls, original = content(base), [], os.fsync

    def fail(fd):
        calls.append(fd)
        if len(calls) == count:
            raise error
        original(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        expected = MergeError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected, match="base is as it was" if expected is MergeError else None):
            run(base)
    assert content(base) == before
    run(base, verify=True)
    assert visible(base) == merged


def test_rollback_fails_too(base, monkeypatch):
    before, original = content(base), os.pwrite

    def fail(fd, data, at):
        if at >= 20 + 72:
            raise OSError(5, "Input/output error")
        return original(fd, data[:3], at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(MergeError, match=r"the roll-back failed too .*the journal \.pema-undo is intact"):
            run(base)
    with pytest.raises(MergeError, match="a merge in place was cut off here; put the base back first with --undo"):
        check_in_place(base)
    assert roll_back_interrupted(base)
    assert content(base) == before


def test_verify_finds_a_lost_write(base, monkeypatch):
    before, original, lost = content(base), os.pwrite, iter([True])
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: len(data) if next(lost, False) else original(fd, data, at))
    with pytest.raises(
        MergeError, match=r"model-1.safetensors: is not what base and delta make; the disk lost a write"
    ):
        run(base, verify=True)
    assert content(base) == before


def refused(base, plan, match):
    before = content(base)
    with pytest.raises(MergeError, match=match):
        run(base, plan)
    assert content(base) == before


def test_tensors_that_would_move(base):
    moved = (
        r"model-1.safetensors: cannot be merged in place: its tensors would move \({}\); write a new checkpoint with"
    )
    refused(base, plan_of(file_a(base, np.array([32]))), moved.format("281 bytes -> 289 bytes"))
    half = CastSegment(CopySegment(InputFile(base / A), 21, 260), "F16", "BF16", Rounding(), "")
    for segment in (
        CopySegment(InputFile(base / A), 20, 260),
        half,
        RowsSegment(half, BytesSegment(bytes(8)), np.array([1]), 8),
    ):
        parts = (BytesSegment(bytes(281 - segment.length)), segment)
        refused(base, plan_of(PlannedFile(A, parts)), moved.format("or change their dtype"))
    new = plan_of(PlannedFile("model.safetensors", (BytesSegment(b"header"), CopySegment(InputFile(base / A), 0, 281))))
    refused(base, new, r"model-1.safetensors: cannot be merged .* \(to model.safetensors\)")


def test_refusals(base, tmp_path, monkeypatch):
    for where, name, value, match in (
        (change_set, "MAX_REPLACED", 8, "config.json: 8 bytes are too many to be replaced in place; write a new"),
        (os, "access", lambda path, mode: path != base, "base: not writable, so it cannot be merged in place"),
        (os, "access", lambda path, mode: path == base, "model-1.safetensors: not writable, so it cannot"),
        (
            shutil,
            "disk_usage",
            lambda path: SimpleNamespace(free=9, total=1 << 40),
            "base: 9 bytes free, but the merge takes",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            refused(base, None, match)
    refused(
        base, plan_of(PlannedFile("../x", (BytesSegment(b"x"),))), "x: would lie outside of the base, or behind a link"
    )
    (base / "adapters").mkdir()
    refused(
        base, plan_of(PlannedFile("adapters", (BytesSegment(b"x"),))), "adapters: not a file, but the merge writes one"
    )
    os.link(base / A, tmp_path / "other")
    refused(base, None, r"model-1.safetensors: has 2 names \(hard links\), and the others would change with it")
    (tmp_path / "other").unlink()
    (base / B).rename(tmp_path / "blob")
    (base / B).symlink_to(tmp_path / "blob")
    plan = plan_of(PlannedFile(B, (BytesSegment(bytes(64)),)))
    refused(base, plan, r"model-2.safetensors: is a link, to the Hub's cache for example, and others would change")
    with pytest.raises(MergeError, match="no: no such folder"):
        run(tmp_path / "no", plan)


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_two_at_once(make_base, make_adapter, kind):
    base = make_base()
    delta, before = make_adapter(base).folder, content(base.folder)
    fd = os.open(base.folder, os.O_RDONLY)
    fcntl.flock(fd, kind)
    with pytest.raises(MergeError, match="base: another merge is changing or reading it; wait for that to end"):
        merge_checkpoint(base.folder, delta, in_place=True)
    with pytest.raises(MergeError, match="base: another merge is changing or reading it; wait for that to end"):
        undo(base.folder)
    os.close(fd)
    assert content(base.folder) == before


def test_readers_share_a_base(make_base, make_adapter, tmp_path):
    base = make_base()
    fd = os.open(base.folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out")
    os.close(fd)


def test_twice(base):
    run(base)
    with pytest.raises(MergeError, match=r"base: already merged in place \(it holds .pema-undo\); undo it first with"):
        check_in_place(base)


@pytest.mark.parametrize("name", ["undo.bin", "ranges.npy", "saved/0", "journal.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_damaged_journals_touch_nothing(base, name, how):
    run(base)
    path = base / undo_journal.JOURNAL_DIR / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if how != "gone":
        path.write_bytes(data if how == "flip" else data[:-1])
    before = content(base)
    with pytest.raises(MergeError, match=rf"{name}: the undo journal is damaged .* and was not followed; fetch"):
        undo(base)
    assert content(base) == before


def test_a_base_that_changed_since(base):
    run(base)
    (base / "adapters" / "mine").write_text("")
    os.truncate(base / A, 280)
    with pytest.raises(
        MergeError, match=r"model-1.safetensors: 280 bytes, expected 281; it was changed after the merge"
    ):
        undo(base)
    os.truncate(base / A, 281)
    undo(base)
    assert [path.name for path in (base / "adapters").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["../other", "/etc/other", "link/other"])
def test_a_journal_from_somebody_else_does_not_lead_elsewhere(base, tmp_path, name):
    (tmp_path / "other").write_text("")
    (base / "link").symlink_to(tmp_path)
    (base / undo_journal.JOURNAL_DIR).mkdir()
    sums = {part: [0, "0" * 64] for part in ("undo.bin", "ranges.npy")}
    undo_journal.write_journal(
        base / undo_journal.JOURNAL_DIR, undo_journal.Journal(undo_journal.PATCHING, {}, [], [name], [], sums)
    )
    with pytest.raises(MergeError, match=r"other' is a link or lies outside of the base\) and was not followed"):
        roll_back_interrupted(base)
    assert (tmp_path / "other").exists()
