"""A merge in place gives what a written merge gives; whatever happens on the way, the base is whole or comes back."""

import os
import threading
from pathlib import Path

import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import MergeError
from pema_adapters.merging.in_place import undo_data, undo_journal
from pema_adapters.merging.in_place.change_set import plan_changes
from pema_adapters.merging.in_place.execute import (
    InPlaceMerge,
    check_in_place,
    merge_in_place,
    roll_back_interrupted,
    undo,
)
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import BytesSegment
from tests.merging.in_place.plans import CONFIG, IDS, NEW, A, B, content, plan_for, plan_of, run, visible


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
    """Run `action` in a child that dies before its `number`-th step. Returns whether it ended before that.

    What a background thread does is not counted: when it does it differs from run to run.
    """
    child = os.fork()
    if not child:
        left = [number]

        def counted(original):
            def call(*args, **kwargs):
                left[0] -= threading.current_thread() is threading.main_thread()
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
