"""Find the folder of the delta."""

import json

import pytest

from pema_adapters.errors import FormatError
from pema_adapters.formats.delta_discovery import MERGE_MANIFEST, find_delta


def adapter(folder, name=None, method="pema"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"name": name or folder.name, "config": {"architecture": method}})
    )
    return folder


def full(folder, weights="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", weights):
        (folder / name).write_text("{}")
    return folder


def refused(folder, name, match):
    with pytest.raises(FormatError, match=match) as error:
        find_delta(folder, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", [".", "task", "checkpoint-500", "checkpoint-500/task"])
@pytest.mark.parametrize("make", [adapter, full])
def test_a_delta_is_found_up_to_two_levels_below(tmp_path, where, make):
    run = tmp_path / "run"
    made = make(run / where)
    assert find_delta(run, None) == made
    assert find_delta(run, made.name) == made
    assert find_delta(run, where) == made
    assert find_delta(run, where + "/") == made


def test_a_delta_three_levels_below_is_not_found(tmp_path):
    adapter(tmp_path / "run" / "a" / "b" / "task")
    refused(tmp_path / "run", None, r"run: no delta here or up to two levels below; expected adapter_config.json with")


@pytest.mark.parametrize(
    "weights", ["model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
)
def test_full_deltas_are_found_in_any_format(tmp_path, weights):
    full(tmp_path, weights)
    assert find_delta(tmp_path, None) == tmp_path


def test_the_first_level_with_a_delta_counts(tmp_path):
    deep = adapter(tmp_path / "checkpoint-500" / "task")
    upper = adapter(tmp_path / "final", "task")
    assert find_delta(tmp_path, None) == upper
    assert find_delta(tmp_path, "task") == upper
    assert find_delta(tmp_path, "checkpoint-500/task") == deep
    full(tmp_path)
    assert find_delta(tmp_path, None) == tmp_path
    assert find_delta(tmp_path, "task") == upper


def test_several_deltas_are_refused_unless_one_is_named(tmp_path):
    for step in (1000, 500, 1500):
        adapter(tmp_path / f"checkpoint-{step}" / "task")
    listed = r"\(checkpoint-500/task, checkpoint-1000/task, checkpoint-1500/task\)"
    choice = r"pick one with --checkpoint latest\|best\|STEP; the newest is: pema-merge --delta \S+ --checkpoint latest"
    refused(tmp_path, None, rf"holds 3 deltas {listed}; {choice}$")
    refused(tmp_path, "task", rf"holds 3 deltas called 'task' {listed}; {choice} --adapter task$")
    refused(tmp_path, "other", r"no adapter 'other' here; found: checkpoint-500/task, ")
    assert find_delta(tmp_path, "checkpoint-1000/task") == tmp_path / "checkpoint-1000" / "task"
    assert find_delta(tmp_path / "checkpoint-500", None) == tmp_path / "checkpoint-500" / "task"


def test_adapters_of_the_same_name_are_told_apart_by_path(tmp_path):
    for run in ("one", "the other"):
        adapter(tmp_path / run / "task")
    refused(
        tmp_path, "task", r"holds 2 deltas called 'task' \(.*\); pick one by its path, as in --adapter 'the other/task'"
    )
    assert find_delta(tmp_path, "the other/task") == tmp_path / "the other" / "task"


def test_a_long_list_is_shortened(tmp_path):
    for step in range(20):
        full(tmp_path / f"checkpoint-{step}")
    refused(tmp_path, None, r"holds 20 deltas \(checkpoint-0, .*checkpoint-7, \.\.\.\)")


def test_adapters_with_rows_are_preferred(tmp_path):
    lora = adapter(tmp_path / "lora", method="lora")
    assert find_delta(tmp_path, None) == lora
    task = adapter(tmp_path / "task")
    assert find_delta(tmp_path, None) == task
    assert find_delta(tmp_path, "lora") == lora


@pytest.mark.parametrize("hidden", [".cache", ".run.pema-partial"])
def test_hidden_folders_are_skipped(tmp_path, hidden):
    adapter(tmp_path / "run" / hidden)
    adapter(tmp_path / "run" / hidden / "task")
    refused(tmp_path / "run", None, "no delta here")
    assert find_delta(tmp_path / "run" / hidden, None) == tmp_path / "run" / hidden


def test_outputs_of_merges_are_skipped_with_everything_below(tmp_path):
    merged = full(tmp_path / "run" / "merged")
    (merged / MERGE_MANIFEST).write_text("{}")
    adapter(merged / "task")
    adapter(merged / "adapters" / "task")
    refused(tmp_path / "run", None, "no delta here")
    refused(merged, None, r"merged: the output of a merge .*, not a delta; give the adapter's folder")
    task = adapter(tmp_path / "run" / "checkpoint-1" / "task")
    assert find_delta(tmp_path / "run", None) == task


def test_links_to_deltas_are_followed_once(tmp_path):
    run, elsewhere = tmp_path / "run", adapter(tmp_path / "elsewhere" / "task")
    adapter(tmp_path / "someone_else_s")
    checkpoint = adapter(run / "checkpoint-500" / "task").parent
    for name, target in [("here", run), ("up", tmp_path), ("broken", tmp_path / "nowhere"), ("circle", run / "circle")]:
        (run / name).symlink_to(target)
    assert find_delta(run, None) == checkpoint / "task"
    (run / "latest").symlink_to(checkpoint)
    assert find_delta(run, None) == checkpoint / "task"
    assert find_delta(run, "latest/task") == run / "latest" / "task"
    (run / "linked").symlink_to(elsewhere)
    assert find_delta(run, None) == run / "linked"


def test_unreadable_folders_are_skipped(tmp_path):
    damaged, task = adapter(tmp_path / "damaged"), adapter(tmp_path / "task")
    (damaged / "adapter_config.json").write_text("{")
    (tmp_path / "a_file").write_text("")
    assert find_delta(tmp_path, "task") == task
    refused(tmp_path, None, r"holds 2 deltas \(damaged, task\)")
    assert find_delta(tmp_path, "damaged") == damaged


def test_a_missing_folder_is_refused(tmp_path):
    refused(
        tmp_path / "nowhere",
        None,
        "nowhere: no such folder; expected a folder written by save_adapter, save_delta or a",
    )
    (tmp_path / "file").write_text("")
    refused(
        tmp_path / "file", None, "file: is a file; expected a folder written by save_adapter, save_delta or a Trainer"
    )
