"""The output folder: what --overwrite may replace, and what the words say when it fails."""

import os
import shutil
import signal

import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import MergeError
from pema_adapters.merging.output import staging
from tests.merging.in_place.plans import content


@pytest.fixture
def merged(make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base).folder
    merge_checkpoint(base.folder, delta, tmp_path / "out")
    return base.folder, delta, tmp_path / "out"


def test_overwriting_an_untouched_output_gives_the_same(merged):
    before = content(merged[2])
    merge_checkpoint(*merged, overwrite=True)
    after = content(merged[2])
    assert before.pop("pema_merge.json") != after.pop("pema_merge.json")  # seconds, times of files
    assert after == before


@pytest.mark.parametrize("name", ["checkpoint-900/model.safetensors", ".git/HEAD", "notes.txt"])
def test_files_of_the_user_are_not_lost(merged, name):
    path = merged[2] / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = content(merged[2])
    with pytest.raises(
        MergeError, match=f"out holds files that no merge wrote \\({name}\\), and --overwrite would lose"
    ):
        merge_checkpoint(*merged, overwrite=True)
    assert content(merged[2]) == before


def test_a_link_of_the_user_is_not_lost(merged, tmp_path):
    (merged[2] / "link").symlink_to(tmp_path)
    with pytest.raises(MergeError, match=r"holds files that no merge wrote \(link\)"):
        merge_checkpoint(*merged, overwrite=True)


def test_edits_of_the_user_are_not_lost(merged):
    (merged[2] / "config.json").write_text("{}")
    with pytest.raises(
        MergeError, match=r"out holds files changed after the merge, .* \(config.json\), and --overwrite would"
    ):
        merge_checkpoint(*merged, overwrite=True)


def test_a_copy_without_its_times_is_refused_with_the_way_out(merged, tmp_path):
    for path in merged[2].iterdir():
        os.utime(path, (1, 1))
    with pytest.raises(MergeError, match=r"or copied without their times .*, or delete the folder if you need nothing"):
        merge_checkpoint(*merged, overwrite=True)


def test_a_file_system_that_rounds_times_does_not_make_files_look_changed(merged):
    for path in merged[2].iterdir():
        seconds = path.stat().st_mtime_ns // 2_000_000_000 * 2
        os.utime(path, (seconds, seconds))
    merge_checkpoint(*merged, overwrite=True)


def test_a_manifest_without_a_list_of_files_still_protects_the_others(merged):
    (merged[2] / "pema_merge.json").write_text('{"output": "out"}')
    merge_checkpoint(*merged, overwrite=True)
    (merged[2] / "pema_merge.json").write_text('{"output": "out"}')
    (merged[2] / "mine").touch()
    with pytest.raises(MergeError, match=r"holds files that no merge wrote \(mine\)"):
        merge_checkpoint(*merged, overwrite=True)


def test_files_in_a_replaced_output_that_was_kept_are_not_lost_by_the_next_merge(merged, tmp_path):
    aside = tmp_path / ".out.pema-replaced"
    shutil.copytree(merged[2], aside)
    (aside / "notes.txt").write_text("mine")
    with pytest.raises(MergeError, match=r"pema-replaced: .* holds files that no merge wrote \(notes.txt\); move it"):
        merge_checkpoint(*merged, overwrite=True)
    assert (aside / "notes.txt").read_text() == "mine"
    assert (merged[2] / "model.safetensors").exists()
    (aside / "notes.txt").unlink()
    (aside / "pema_merge.json").unlink()  # as a removal that was cut off leaves it
    merge_checkpoint(*merged, overwrite=True)
    assert not aside.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_the_two_renames_is_delivered_after_them(merged, monkeypatch, number):
    original = staging._commit

    def commit(stage, folder):
        os.kill(os.getpid(), number)
        original(stage, folder)

    monkeypatch.setattr(staging, "_commit", commit)
    previous = signal.signal(number, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt, match="out is complete"):
            merge_checkpoint(*merged, overwrite=True)
    finally:
        signal.signal(number, previous)
    assert (merged[2] / "pema_merge.json").exists()
    assert sorted(path.name for path in merged[2].parent.iterdir()) == ["base", "out", "run"]


def test_an_output_that_a_killed_merge_moved_aside_comes_back(merged, tmp_path):
    before = content(merged[2])
    merged[2].rename(tmp_path / ".out.pema-replaced")
    with pytest.raises(MergeError, match="exists from an earlier merge"):
        merge_checkpoint(*merged)
    assert content(merged[2]) == before


def test_a_second_rename_that_fails_puts_the_old_output_back(merged, monkeypatch):
    before, original = content(merged[2]), type(merged[2]).replace

    def replace(path, other):
        if path.name.endswith(".pema-partial"):
            raise OSError(5, "Input/output error")
        return original(path, other)

    monkeypatch.setattr(type(merged[2]), "replace", replace)
    with pytest.raises(MergeError, match=r"cannot be put in place \(Input/output error\); nothing was left behind"):
        merge_checkpoint(*merged, overwrite=True)
    assert content(merged[2]) == before


def test_what_fails_behind_the_rename_does_not_deny_the_output(merged, tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(staging, "sync_folder", fail)
    with pytest.raises(MergeError, match=r"Input/output error; .*other is complete"):
        merge_checkpoint(*merged[:2], tmp_path / "other")
    assert (tmp_path / "other" / "pema_merge.json").exists()


def test_a_stage_that_cannot_be_removed_is_named(merged, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(staging.shutil, "rmtree", lambda *args, **kwargs: None)
    with pytest.raises(MergeError, match=r"\.other\.pema-partial is incomplete and could not be removed"):
        merge_checkpoint(*merged[:2], tmp_path / "other")


def test_folders_made_for_an_output_that_fails_go_as_well(merged, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(MergeError, match="No space left on device; nothing was left behind"):
        merge_checkpoint(*merged[:2], tmp_path / "a" / "b" / "other")
    assert not (tmp_path / "a").exists()


def test_a_replaced_output_that_cannot_be_removed_is_told(merged, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(staging.shutil, "rmtree", fail)
    report = merge_checkpoint(*merged, overwrite=True)
    assert report.notes[-1].startswith("the replaced output could not be removed (Permission denied); delete ")
