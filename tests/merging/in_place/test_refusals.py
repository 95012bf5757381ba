"""Bases, plans and journals that a merge in place refuses, and what it does not touch then."""

import fcntl
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import MergeError
from pema_adapters.io.input_file import InputFile
from pema_adapters.merging.in_place import change_set, undo_journal
from pema_adapters.merging.in_place.execute import (
    check_in_place,
    roll_back_interrupted,
    undo,
)
from pema_adapters.merging.plan.dtype_cast import Rounding
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import BytesSegment, CastSegment, CopySegment, RowsSegment
from tests.merging.in_place.plans import (
    A,
    B,
    content,
    file_a,
    plan_of,
    run,
)


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
