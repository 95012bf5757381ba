"""A base that changes while a model trains on it is a clear error; changed rows are never used."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from pema_adapters import PartialVocabulary, load_model, restore_embeddings, save_delta, shrink_embeddings
from pema_adapters.errors import InputChangedError
from pema_adapters.io import input_file
from pema_adapters.training.base.mapped_rows import MappedRows
from tests.models import MIXED, USED, V, assert_same, matrix_of, outputs
from tests.training.test_shrink import perturb, shrunk

CHANGED = r"model\.safetensors: changed while it was in use: .*; run again when nothing writes to it"


def weights(case):
    return Path(case.folder, "model.safetensors")


def other_weights(case, tmp_path):
    """A file of the same size with other values."""
    other = case.plain()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.save_pretrained(tmp_path / "other")
    return tmp_path / "other" / "model.safetensors"


def copy_over(case, tmp_path):
    shutil.copyfile(other_weights(case, tmp_path), weights(case))


def cut(case, tmp_path):
    os.truncate(weights(case), 1000)


def patch_a_row(case, tmp_path):
    with weights(case).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 4)


def adapter_model(case):
    return shrunk(case)


def full_model(case):
    return load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))


@pytest.mark.parametrize("change", [copy_over, cut, patch_a_row])
@pytest.mark.parametrize("make", [adapter_model, full_model])
def test_forward_save_and_restore_refuse_a_changed_base(case, tmp_path, make, change):
    model = make(case)
    change(case, tmp_path)
    for use in (
        lambda: outputs(model, MIXED),
        lambda: model.save_pretrained(tmp_path / "saved"),
        lambda: restore_embeddings(model),
        lambda: shrink_embeddings(model, "task" if make is adapter_model else None, PartialVocabulary([7], V)),
    ):
        with pytest.raises(InputChangedError, match=CHANGED):
            use()
    assert not (tmp_path / "saved").exists()


def test_saving_into_the_folder_of_a_changed_base_leaves_it_alone(case, tmp_path):
    model = full_model(case)
    patch_a_row(case, tmp_path)
    before = {path.name: path.read_bytes() for path in Path(case.folder).iterdir()}
    with pytest.raises(InputChangedError, match=CHANGED):
        model.save_pretrained(case.folder)
    assert {path.name: path.read_bytes() for path in Path(case.folder).iterdir()} == before


def rename(path):
    path.rename(path.with_name("moved"))


def rename_over(path):
    path.with_name("newer").write_bytes(bytes(path.stat().st_size))
    path.with_name("newer").replace(path)


def link_and_mode(path):
    os.link(path, path.with_name("second"))
    path.chmod(0o400)


@pytest.mark.parametrize("change", [rename, Path.unlink, rename_over, link_and_mode])
def test_renaming_linking_and_chmod_are_no_change(case, tmp_path, monkeypatch, change):
    expected = outputs(case.plain(), MIXED)
    model = full_model(case)
    change(weights(case))
    monkeypatch.setattr(input_file._open_files, "_limit", 1)
    for i in range(3):  # evicts every descriptor that is not pinned
        (tmp_path / f"{i}").write_bytes(b"0")
        input_file.InputFile(tmp_path / f"{i}").open()
    assert_same(outputs(model, MIXED), expected)
    model.save_pretrained(tmp_path / "saved")
    assert_same(outputs(case.auto_class.from_pretrained(tmp_path / "saved"), MIXED), expected)


@pytest.mark.parametrize("where", ["in place", "renamed", "through a link"])
def test_saving_over_the_base_keeps_its_rows(case, tmp_path, where):
    """The old file is moved aside, under any name."""
    model, folder = full_model(case), Path(case.folder)
    with torch.no_grad():
        matrix_of(model).mul_(1.5)
    expected = outputs(model, MIXED)
    if where == "renamed":
        folder = folder.rename(tmp_path / "renamed")
    elif where == "through a link":
        folder = tmp_path / "links"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(weights(case))
    for _ in range(2):
        model.save_pretrained(folder)
        assert_same(outputs(model, MIXED), expected)
        assert_same(outputs(case.auto_class.from_pretrained(folder), MIXED), expected)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_delta_can_be_saved_after_the_base_has_changed(case, tmp_path):
    model = full_model(case)
    patch_a_row(case, tmp_path)
    save_delta(model, tmp_path / "delta")
    assert (tmp_path / "delta" / "model.safetensors").exists()


def test_an_adapter_can_be_saved_after_the_base_has_changed(case, tmp_path):
    model = shrunk(case)
    perturb(model)
    patch_a_row(case, tmp_path)
    model.save_adapter(str(tmp_path / "run"), "task")
    assert (tmp_path / "run" / "pytorch_adapter.bin").exists()


CUT = """
    import os, sys
    import torch
    from transformers import AutoModelForSequenceClassification
    from pema_adapters import PartialVocabulary, load_model
    model = load_model(AutoModelForSequenceClassification, sys.argv[1], PartialVocabulary([3], 120))
    os.truncate(sys.argv[1] + "/model.safetensors", 5000)
    for use in (lambda: model(input_ids=torch.arange(120)[None, :30]), lambda: model.save_pretrained(sys.argv[2])):
        try:
            use()
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_truncated_file_does_not_kill_the_process(case, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(CUT), case.folder, str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.returncode
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("InputChangedError" in line and "bytes" in line for line in lines), done.stdout


def test_a_change_while_blocks_are_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("pema_adapters.training.base.mapped_rows.BLOCK_BYTES", 100)
    path = tmp_path / "rows"
    path.write_bytes(torch.arange(1000.0).numpy().tobytes())
    rows = MappedRows(input_file.InputFile(path), 0, (100, 10), torch.float32)
    found = rows.iterate_blocks()
    assert next(found).flatten().tolist() == list(range(20))
    os.truncate(path, 200)
    with pytest.raises(InputChangedError, match=r"went from 4,000 to 200 bytes|ends at byte 200 now"):
        next(found)
