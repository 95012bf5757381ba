"""Bases and deltas that change while they are merged: refused in one line, and nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import InputChangedError
from pema_adapters.merging import api
from pema_adapters.merging.in_place import execute
from tests.merging.conftest import T, noise, write
from tests.merging.in_place.plans import content


def rewrite(path):
    """The same inode, other bytes, the same size: what `cp` does."""
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(8))


def rename_over(path):
    fresh = path.with_name("fresh")
    fresh.write_bytes(path.read_bytes())
    fresh.replace(path)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def remove(path):
    path.unlink()


CHANGES = [rewrite, rename_over, cut, remove]


@pytest.fixture
def pair(make_base, make_adapter):
    base = make_base()
    return base.folder, make_adapter(base, rest={"bert.x.adapters.task.w": T.of(noise(3))}).folder


def change_after(monkeypatch, module, name, action):
    """Have `action` happen right after the first call of `module.name`."""
    original, left = getattr(module, name), [action]

    def call(*args, **kwargs):
        found = original(*args, **kwargs)
        if left:
            left.pop()()
        return found

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("moment", ["plan_merge", "check_space", "write_plan"])
@pytest.mark.parametrize("name", ["base/model.safetensors", "base/config.json", "run/adapter.safetensors"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_plan_and_commit_is_refused(pair, tmp_path, monkeypatch, change, name, moment, verify):
    path = tmp_path / name
    change_after(monkeypatch, api, moment, lambda: change(path))
    with pytest.raises(InputChangedError, match=f"{path}: changed while it was in use: .*; run again"):
        merge_checkpoint(*pair, tmp_path / "out", verify=verify)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["base", "run"]


def test_a_delta_saved_again_is_refused_in_place_and_the_base_is_as_it_was(pair, tmp_path, monkeypatch):
    before = content(tmp_path / "base")
    change_after(monkeypatch, execute, "_apply_changes", lambda: rewrite(tmp_path / "run" / "adapter.safetensors"))
    with pytest.raises(InputChangedError, match=r"adapter.safetensors: changed while it was in use: it was written to"):
        merge_checkpoint(*pair, in_place=True)
    assert content(tmp_path / "base") == before


def test_a_base_that_changes_before_it_is_patched_is_refused(pair, tmp_path, monkeypatch):
    path = tmp_path / "base" / "model.safetensors"
    change_after(monkeypatch, execute, "plan_changes", lambda: rewrite(path))
    with pytest.raises(InputChangedError, match=r"model.safetensors: changed while it was in use"):
        merge_checkpoint(*pair, in_place=True)
    assert not (tmp_path / "base" / ".pema-undo").exists()


def test_a_dry_run_sees_changes(pair, tmp_path, monkeypatch):
    change_after(monkeypatch, api, "plan_merge", lambda: rewrite(tmp_path / "base" / "model.safetensors"))
    with pytest.raises(InputChangedError):
        merge_checkpoint(*pair, tmp_path / "out", dry_run=True)


MANY_SHARDS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pema_adapters import merge_checkpoint
merge_checkpoint(*sys.argv[1:])
"""


def test_more_shards_than_descriptors(make_base, make_adapter, tmp_path):
    extra = {f"bert.layer.{i}.weight": T.of(noise(3, seed=i)) for i in range(200)}
    base = make_base(extra=extra, shards=205)
    delta = make_adapter(base).folder
    merge_checkpoint(base.folder, delta, tmp_path / "expected")
    subprocess.run([sys.executable, "-c", MANY_SHARDS, base.folder, delta, tmp_path / "out"], check=True)
    expected, found = content(tmp_path / "expected"), content(tmp_path / "out")
    del expected["pema_merge.json"], found["pema_merge.json"]
    assert found == expected


def test_nothing_of_the_delta_stays_mapped(make_base, tmp_path):
    """Folding reads the delta block by block; when the merge has ended, no map and no descriptor is left."""
    base = make_base()
    delta = lora_delta(tmp_path)
    merge_checkpoint(base.folder, delta, tmp_path / "out")
    assert "adapter.safetensors" not in Path("/proc/self/maps").read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(link.resolve())]


def lora_delta(folder):
    run = folder / "run"
    run.mkdir()
    name = "bert.encoder.layer.0.output.dense.loras.task."
    write(run / "adapter.safetensors", {name + "lora_A": T.of(noise(2, 4)), name + "lora_B": T.of(noise(4, 2))})
    method = '{"architecture": "lora", "r": 2, "alpha": 4, "composition_mode": "add", "use_gating": false}'
    (run / "adapter_config.json").write_text(f'{{"config": {method}, "name": "task", "model_type": "bert"}}')
    return run
