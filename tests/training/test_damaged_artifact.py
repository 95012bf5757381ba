"""Artifacts with missing or damaged token ids: load_adapter refuses them instead of computing with the base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pema_adapters.errors import SurgeryError
from tests.models import MIXED, assert_same, outputs
from tests.training.test_shrink import perturb, rows_of, shrunk

IDS = "bert.pema.adapters.task.token_ids"
WEIGHT = "bert.pema.adapters.task.weight"


@pytest.fixture
def artifact(case, tmp_path):
    """The folder of a saved artifact, and the outputs of its adapter."""
    model = shrunk(case)
    perturb(model)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    return tmp_path / "run", outputs(model, MIXED)


def rewrite(folder, change):
    file = Path(folder, "adapter.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def load(case, folder):
    model = case.with_adapters()
    model.load_adapter(str(folder), set_active=True, use_safetensors=True)
    return model


DAMAGES = {
    "no ids": (lambda t: t.pop(IDS), "0 ids for 10 rows, expected as many"),
    "no rows": (lambda t: t.pop(WEIGHT), "10 ids for 0 rows, expected as many"),
    "halves": (lambda t: t.update({IDS: t[IDS].float() + 0.5}), "ids of dtype float32, expected int32"),
    "bytes": (lambda t: t.update({IDS: t[IDS].to(torch.int8)}), "ids of dtype int8, expected int32"),
    "truth values": (lambda t: t.update({IDS: t[IDS].bool()}), "ids of dtype bool, expected int32"),
    "a matrix of ids": (lambda t: t.update({IDS: t[IDS][None]}), r"\(1, 10\) ids do not match \(10, 32\) rows"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ids_are_refused_in_one_line(case, artifact, damage):
    folder, _ = artifact
    change, message = DAMAGES[damage]
    rewrite(folder, change)
    with pytest.raises(SurgeryError, match=rf"^cannot load embedding rows: {IDS}: {message}; .*$"):
        load(case, folder)


def test_int64_ids_are_accepted(case, artifact):
    folder, expected = artifact
    rewrite(folder, lambda tensors: tensors.update({IDS: tensors[IDS].long()}))
    model = load(case, folder)
    assert rows_of(model).token_ids.dtype == torch.int32
    assert_same(outputs(model, MIXED), expected)
