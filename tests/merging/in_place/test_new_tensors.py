"""A new head in place: the base's file keeps its bytes under another name, and one shard with the head stands beside it."""

import json
import os
from pathlib import Path

import adapters
import pytest
import torch
from adapters import ConfigUnion, LoRAConfig
from transformers import AutoModelForSequenceClassification as Auto

import pema_adapters
from pema_adapters import merge_checkpoint, undo_merge
from pema_adapters.errors import MergeError
from pema_adapters.formats.safetensors_header import encode_header, read_header
from pema_adapters.merging.in_place import undo_journal
from pema_adapters.merging.in_place.execute import roll_back_interrupted, undo
from pema_adapters.merging.output import file_patcher
from pema_adapters.merging.planning import added_shard
from tests.merging.conftest import T, noise, read
from tests.merging.folding.test_folded_weight import ALL, MORE, hidden, noisy
from tests.merging.in_place.plans import content
from tests.merging.in_place.test_execute import killed_at
from tests.models import CONFIGS, USED, perturb_trained

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = added_shard.SHARDS
HEAD = {"classifier.weight": T.of(noise(3, 4)), "classifier.bias": T.of(noise(3))}


@pytest.fixture(params=[True, False], ids=["prefixed", "bare"])
def pair(request, make_base, make_adapter):
    base = compact(make_base(prefixed=request.param))
    return base.folder, make_adapter(base, head=HEAD).folder


def compact(base):
    """Headers without blanks, as the safetensors library writes them: no room for anything."""
    for path in base.folder.glob("*.safetensors"):
        header, data = read_header(path), path.read_bytes()
        described = [(t.name, t.dtype, t.shape) for t in header.tensors.values()]
        path.write_bytes(encode_header(described, header.metadata) + data[header.data_start :])
    return base


def merge(pair, **more):
    return merge_checkpoint(*pair, in_place=True, **more)


def weight_map(folder):
    return json.loads((folder / INDEX).read_bytes())["weight_map"]


def headless(folder, family, prefixed):
    """A base without a head, in one file."""
    torch.manual_seed(5)
    model = noisy(Auto.from_config((CONFIGS | MORE)[family]()))
    if not prefixed:
        model.base_model.save_pretrained(folder)
    else:
        inside = {name: t for name, t in model.state_dict().items() if name.startswith(model.base_model_prefix + ".")}
        model.save_pretrained(folder, state_dict=inside)


@pytest.mark.parametrize("prefixed", [True, False], ids=["prefixed", "bare"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "gpt2"])
def test_transformers_loads_it(tmp_path, family, prefixed):
    base, run = tmp_path / "base", tmp_path / "run"
    headless(base, family, prefixed)
    model = Auto.from_pretrained(base)
    adapters.init(model)
    method = ConfigUnion(pema_adapters.PEMAConfig(), LoRAConfig(**ALL, r=4, alpha=12))
    model.add_adapter("task", config=method, set_active=True)
    pema_adapters.shrink_embeddings(model, "task", [{"input_ids": USED}])
    model.train_adapter("task")
    perturb_trained(model)
    model.save_adapter(run, "task", use_safetensors=True, with_head=True)
    expected = hidden(model)  # now: the model maps the files that a merge in place changes

    before, inode = content(base), (base / SINGLE).stat().st_ino
    merge_checkpoint(base, run, tmp_path / "out")
    report = merge((base, run), verify=True)
    assert report.rows_merged and report.tensors_folded and not report.adapters_left
    assert ((base / FIRST).stat().st_ino, (base / FIRST).stat().st_size) == (inode, len(before[SINGLE]))
    written, loaded = Auto.from_pretrained(tmp_path / "out"), Auto.from_pretrained(base, output_loading_info=True)
    assert not any(loaded[1].values())
    assert hidden(loaded[0]).equal(hidden(written))
    torch.testing.assert_close(hidden(loaded[0]), expected, rtol=2e-5, atol=2e-5)
    undo_merge(base)
    assert content(base) == before
    assert (base / SINGLE).stat().st_ino == inode


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("prefixed", [True, False], ids=["prefixed", "bare"])
def test_as_written_elsewhere(make_base, make_adapter, tmp_path, shards, prefixed):
    base = compact(make_base(prefixed=prefixed, shards=shards))
    delta, before = make_adapter(base, head=HEAD), content(base.folder)
    merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    report = merge((base.folder, delta.folder), verify=True)
    added = SECOND if shards == 1 else added_shard.ADDED
    files = {FIRST, SECOND} if shards == 1 else {*base.shards.values(), added}
    assert {path.name for path in base.folder.glob("*.safetensors")} == files
    assert read(base.folder) == read(tmp_path / "out")
    assert set(weight_map(base.folder)) == read(base.folder).keys()
    index = json.loads((base.folder / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in read(base.folder).values())
    moved = {name for name, file in weight_map(base.folder).items() if file == added}
    assert moved > HEAD.keys() if not prefixed else moved == HEAD.keys()
    assert any("moved to" in note for note in report.notes) != prefixed
    assert any(f"{SINGLE} is called {FIRST} now" in note for note in report.notes) == (shards == 1)
    again = merge_checkpoint(base.folder, delta.folder, tmp_path / "again", allow_base_mismatch=True)
    assert again.tensors_changed and read(tmp_path / "again") == read(tmp_path / "out")
    undo(base.folder)
    assert content(base.folder) == before


def test_a_dry_run_changes_nothing(pair):
    before = content(pair[0])
    merge(pair, dry_run=True)
    assert content(pair[0]) == before


def test_killed_at_every_step(pair, monkeypatch):
    monkeypatch.setattr(file_patcher, "STEP", 32)
    base = pair[0]
    before, number, seen = content(base), 1, set()
    while not killed_at(number, lambda: merge(pair)):
        names = frozenset(path.name for path in base.glob("model*"))
        rolled_back, done = roll_back_interrupted(base), (base / undo_journal.JOURNAL_DIR).exists()
        seen.add((rolled_back, done, names))
        if done:
            assert weight_map(base)["classifier.weight"] == SECOND
            undo(base)
        assert content(base) == before
        number += 1
    both = frozenset({FIRST, SECOND, INDEX})
    halfway = {(True, False, frozenset(names)) for names in ({SINGLE}, {FIRST}, {FIRST, SECOND}, both)}
    assert seen == {(False, False, frozenset({SINGLE}))} | halfway | {(False, True, both)}
    assert number > 30


@pytest.mark.slow
@pytest.mark.parametrize("back", [roll_back_interrupted, undo])
def test_killed_at_every_step_back(pair, monkeypatch, back):
    monkeypatch.setattr(file_patcher, "STEP", 32)
    base = pair[0]
    before, number = content(base), 1
    if back is roll_back_interrupted:
        monkeypatch.setattr(undo_journal, "mark_done", lambda *args: None)
    merge(pair)
    while not killed_at(number, lambda: back(base)):
        if not roll_back_interrupted(base) and (base / undo_journal.JOURNAL_DIR).exists():
            undo(base)
        assert content(base) == before
        merge(pair)
        number += 1
    assert content(base) == before
    assert number > 20


@pytest.mark.parametrize("where", [(os, "fsync"), (os, "fdatasync"), (Path, "replace")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failures_are_rolled_back_at_once(pair, monkeypatch, where, error):
    """In the middle of each kind of step; the background's errors come out too."""
    monkeypatch.setattr(file_patcher, "STEP", 32)
    before, original, count = content(pair[0]), getattr(*where), 0
    while True:
        count += 1
        calls = iter([None] * (count - 1) + [error])

        def fail(*args, calls=calls):
            found = next(calls, None)
            if found is not None:
                raise found
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(*where, fail)
            try:
                merge(pair)
                break
            except (MergeError, KeyboardInterrupt):
                pass
        assert content(pair[0]) == before
    assert count > 1
    assert weight_map(pair[0])["classifier.bias"] == SECOND


def refused(pair, match):
    before = content(pair[0])
    with pytest.raises(MergeError, match=match):
        merge(pair)
    assert content(pair[0]) == before


def test_refusals(pair, tmp_path):
    path = pair[0] / SINGLE
    os.link(path, tmp_path / "other")
    refused(pair, r"/model.safetensors: has 2 names \(hard links\), and the others would change with it")
    (tmp_path / "other").unlink()
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    refused(pair, r"/model.safetensors: is a link, to the Hub's cache for example, and others would change")
    path.unlink()
    (tmp_path / "blob").rename(path)
    for name in added_shard.SHARDS:
        (pair[0] / name).symlink_to("nowhere")
        refused(pair, rf"{name}: is there, but no weights file of the base, and its name is needed; write a new")
        (pair[0] / name).unlink()
    merge(pair)


def test_a_read_only_file(pair, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != pair[0] / SINGLE)
    refused(pair, r"/model.safetensors: not writable, so it cannot be merged in place")


def test_no_room_for_the_prefix(make_base, make_adapter, monkeypatch):
    base = compact(make_base(prefixed=False))
    pair = base.folder, make_adapter(base, head=HEAD).folder
    longer = r"need the prefix 'bert', which makes its header \d+ bytes longer, and the tensors behind it are too large"
    with monkeypatch.context() as patch:
        patch.setattr(added_shard, "MAX_MOVED", 64)
        refused(pair, rf"/model.safetensors: cannot be merged in place: beside a head its names {longer}")
    shards = compact(
        make_base(prefixed=False, shards=5, name="shards")
    )  # a tensor each: nothing stands behind the header
    refused((shards.folder, pair[1]), longer)


def test_a_grown_vocabulary_moves_tensors(make_base, make_adapter):
    base = make_base()
    delta = make_adapter(base, head=HEAD, ids=[2, 20, 21, 22, 23, 24], vocab_size=25)
    refused((base.folder, delta.folder), r"/model.safetensors: cannot be merged in place: its tensors would move")


def test_a_base_that_changed_since(pair):
    merge(pair)
    (pair[0] / SINGLE).write_text("saved again")
    before = content(pair[0])
    with pytest.raises(MergeError, match=rf"{SINGLE}: there again, beside {FIRST}; it was changed after the merge in"):
        undo(pair[0])
    assert content(pair[0]) == before
    (pair[0] / SINGLE).unlink()
    (pair[0] / FIRST).rename(pair[0] / "away")
    with pytest.raises(MergeError, match=rf"{SINGLE}: no bytes, expected \d+; it was changed after the merge in place"):
        undo(pair[0])
    (pair[0] / "away").rename(pair[0] / FIRST)
    undo(pair[0])


@pytest.mark.parametrize("renamed", [{"../other": "x"}, {SINGLE: "/etc/other"}, {SINGLE: "link/other"}, {SINGLE: 1}, 1])
def test_a_journal_from_somebody_else_renames_nothing_elsewhere(pair, tmp_path, renamed):
    (pair[0] / "link").symlink_to(tmp_path)
    (pair[0] / undo_journal.JOURNAL_DIR).mkdir()
    found = undo_journal.Journal(undo_journal.PATCHING, {}, [], [], [], {}, renamed=renamed)
    undo_journal.write_journal(pair[0] / undo_journal.JOURNAL_DIR, found)
    before = content(pair[0])
    with pytest.raises(MergeError, match=r"journal.json: the undo journal is damaged .* and was not followed"):
        roll_back_interrupted(pair[0])
    assert content(pair[0]) == before


def test_an_index_that_was_left_behind_is_replaced_and_comes_back(pair):
    (pair[0] / INDEX).write_text('{"weight_map": {"old": "model-00001-of-00009.safetensors"}}')
    before = content(pair[0])
    merge(pair)
    assert weight_map(pair[0])["classifier.weight"] == SECOND
    undo(pair[0])
    assert content(pair[0]) == before
