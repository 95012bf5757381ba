"""Undoing a merge in place after somebody changed the base: refused, and nothing is lost."""

import json
import os

import numpy as np
import pytest

from pema_adapters import merge_checkpoint, undo_merge
from pema_adapters.errors import MergeError
from pema_adapters.io.digest import sha256_file
from pema_adapters.merging.in_place import execute, undo_journal
from tests.merging.conftest import T, noise
from tests.merging.in_place.plans import content

WEIGHTS = "model.safetensors"
HEAD = {"classifier.weight": T.of(noise(3, 4)), "classifier.bias": T.of(noise(3))}


@pytest.fixture
def pair(make_base, make_adapter):
    base = make_base(
        extra={"bert.encoder.wide": T.of(noise(300, 40)), **{k: T.of(np.ones(v.shape)) for k, v in HEAD.items()}}
    )
    rest = {"bert.x.adapters.task.w": T.of(noise(3))}
    return base.folder, make_adapter(base, head=HEAD, rest=rest).folder


def fine_tune(path):
    """Other numbers in every tensor, in a file of the same size and header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + np.random.default_rng(0).bytes(len(data) - start))


def refused(base, match, again=undo_merge):
    before = content(base)
    with pytest.raises(MergeError, match=match):
        again(base)
    assert content(base) == before


def test_a_model_saved_over_the_base_is_not_touched(pair):
    base, delta = pair
    merge_checkpoint(base, delta, in_place=True)
    fine_tune(base / WEIGHTS)
    refused(base, "model.safetensors: bytes that the merge did not write have changed; it was changed after")


def test_rows_trained_on_are_not_touched(pair):
    base, delta = pair
    merge_checkpoint(base, delta, in_place=True)
    ranges = np.load(base / undo_journal.JOURNAL_DIR / "ranges.npy")
    with (base / WEIGHTS).open("r+b") as file:
        os.pwrite(file.fileno(), b"trained", int(ranges[0, 1]))
    refused(base, "model.safetensors: the rows or weights that the merge wrote have changed")


@pytest.mark.parametrize(
    "name", ["config.json", "adapters/task/adapter_config.json", "adapters/task/adapter.safetensors"]
)
def test_an_edited_file_keeps_its_edit(pair, name):
    base, delta = pair
    merge_checkpoint(base, delta, in_place=True)
    path = base / name
    path.write_bytes(path.read_bytes().replace(b'"', b"'", 1) + b" ")
    refused(base, f"{name}: its content is not what the merge wrote; it was changed after the merge in place, and undo")


def test_a_removed_adapter_is_no_hindrance(pair):
    base, delta = pair
    before = content(base)
    merge_checkpoint(base, delta, in_place=True)
    (base / "adapters" / "task" / "adapter.safetensors").unlink()
    undo_merge(base)
    assert content(base) == before


def test_an_interrupted_merge_is_not_rolled_back_over_another_model(pair, monkeypatch):
    base, delta = pair

    def stop(*args):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(execute, "_rollback_on_error", lambda *args, **options: None)
        patch.setattr(undo_journal, "mark_done", stop)
        merge_checkpoint(base, delta, in_place=True)
    fine_tune(base / WEIGHTS)
    refused(
        base,
        "bytes that the merge did not write have changed",
        again=lambda base: merge_checkpoint(base, delta, in_place=True),
    )


def test_journals_of_version_1_are_undone(pair):
    base, delta = pair
    before = content(base)
    merge_checkpoint(base, delta, in_place=True)
    path = base / undo_journal.JOURNAL_DIR / "journal.json"
    found = json.loads(path.read_bytes())["journal"]
    for key in ("made", "written", "samples"):
        del found[key]
    path.write_text(json.dumps({"version": 1, "sha256": undo_journal._sum(found), "journal": found}))
    undo_merge(base)
    assert content(base) == before


def test_newer_journals_are_named(pair):
    base, delta = pair
    merge_checkpoint(base, delta, in_place=True)
    path = base / undo_journal.JOURNAL_DIR / "journal.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 3}))
    refused(base, r"journal.json: written by a newer version of pema_adapters \(format 3, this one reads up to 2\)")


def test_fields_of_later_versions_are_ignored(pair):
    base, delta = pair
    before = content(base)
    merge_checkpoint(base, delta, in_place=True)
    path = base / undo_journal.JOURNAL_DIR / "journal.json"
    found = json.loads(path.read_bytes())["journal"] | {"later": 1}
    path.write_text(json.dumps({"version": 2, "sha256": undo_journal._sum(found), "journal": found}))
    undo_merge(base)
    assert content(base) == before


def forge(base, ranges=None, **fields):
    """Change a journal and renew all of its sums, as an attacker can."""
    folder = base / undo_journal.JOURNAL_DIR
    found = json.loads((folder / "journal.json").read_bytes())["journal"]
    if ranges is not None:
        np.save(folder / "ranges.npy", ranges)
        found["sums"]["ranges.npy"] = [(folder / "ranges.npy").stat().st_size, sha256_file(folder / "ranges.npy")]
    found |= fields
    content = {"version": 2, "sha256": undo_journal._sum(found), "journal": found}
    (folder / "journal.json").write_text(json.dumps(content))


RANGES = [
    np.array([[0, 0, 2**62]]), np.array([[0, 2**40, 8]]), np.array([[0, -8, 8]]), np.array([[0, 8, -8]]),
    np.array([[7, 0, 8]]), np.array([[0, 0, 8], [0, 4, 8]]), np.array([[0.5, 0, 8]]), np.array([0, 0, 8]),
    np.array([[0, 0, 0]]), np.array(["x"]), np.array([[0, 2**63 - 1, 2**63 - 1]]), np.empty((0, 3), np.int64),
]  # fmt: skip


@pytest.mark.parametrize("ranges", RANGES, ids=range(len(RANGES)))
def test_forged_ranges_touch_nothing(pair, ranges):
    base, delta = pair
    merge_checkpoint(base, delta, in_place=True)
    forge(base, ranges)
    refused(base, r"ranges.npy: the undo journal is damaged \(.*\) and was not followed")


FIELDS = [
    {"state": "x"}, {"state": 1}, {"patched": []}, {"patched": {WEIGHTS: "1"}}, {"patched": {WEIGHTS: -1}},
    {"replaced": 1}, {"replaced": [1]}, {"created": [None]}, {"folders": "abc"}, {"sums": {}}, {"sums": []},
    {"sums": {"undo.bin": [1, "x"], "ranges.npy": [1, "x"]}}, {"report": 5}, {"renamed": {"a": "b"}},
    {"made": {"config.json": 1}}, {"written": {WEIGHTS: 7}}, {"samples": []},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_forged_fields_touch_nothing(pair, fields):
    base, delta = pair
    merge_checkpoint(base, delta, in_place=True)
    forge(base, **fields)
    refused(base, r"journal.json: the undo journal is damaged \(.*\) and was not followed")


def test_a_journal_that_cannot_be_removed_is_named(pair, monkeypatch):
    base, delta = pair
    before = content(base)
    merge_checkpoint(base, delta, in_place=True)

    def fail(path, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(undo_journal.shutil, "rmtree", fail)
        with pytest.raises(
            MergeError, match=r"the base is as it was, but what is left of the undo journal cannot be rem"
        ):
            undo_merge(base)
    with pytest.raises(MergeError, match="nothing to undo"):
        undo_merge(base)
    assert content(base) == before


def test_private_bases_stay_private(pair):
    base, delta = pair
    before = os.umask(0o022)
    try:
        for path in base.iterdir():
            path.chmod(0o600)
        merge_checkpoint(base, delta, in_place=True)
        files = [path for path in base.rglob("*") if path.is_file() and undo_journal.JOURNAL_DIR not in path.parts]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
        assert (base / undo_journal.JOURNAL_DIR).stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
