"""Base rows from a folder, shards, the Hub's cache, or a spill file."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from pema_adapters import PartialVocabulary, load_model
from pema_adapters.errors import SurgeryError
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.training.base.find_base import find_base
from pema_adapters.training.base.mapped_rows import MappedRows
from tests.models import MIXED, USED, V, assert_same, matrix_of, outputs

NAME = "embeddings.word_embeddings.weight"


def make_base(model):
    return find_base(model, matrix_of(model), NAME)


def test_rows_are_read_from_the_checkpoint(case):
    base = make_base(case.plain())
    assert base.matrix.find_in(Path(case.folder)).name == "model.safetensors"
    assert_same([base.read_rows(torch.tensor([5, 0, 119]))], [matrix_of(case.plain())[[5, 0, 119]]])
    assert_same([torch.cat(list(base.matrix.iterate_blocks()))], [matrix_of(case.plain())])


def test_shards_are_found_through_their_index(case, tmp_path):
    case.plain().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    model = load_model(case.auto_class, tmp_path / "shards", PartialVocabulary(USED, V))
    assert model.get_input_embeddings().base.matrix.find_in(tmp_path / "shards")
    assert_same(outputs(model, MIXED), outputs(case.plain(), MIXED))


def test_a_headless_checkpoint_of_the_same_model_matches(case, tmp_path):
    AutoModel.from_pretrained(case.folder).save_pretrained(tmp_path / "headless")
    torch.manual_seed(0)
    model = case.auto_class.from_pretrained(tmp_path / "headless")
    assert make_base(model).matrix.find_in(tmp_path / "headless")


@pytest.mark.slow
def test_the_hub_cache_is_found(case, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(case.folder, snapshot)
    (tmp_path / "hub" / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    program = f"""
        from pathlib import Path
        from transformers import AutoModelForSequenceClassification
        from pema_adapters import PartialVocabulary, load_model
        model = load_model(AutoModelForSequenceClassification, "org/tiny", PartialVocabulary([5], {V}))
        assert model.get_input_embeddings().base.matrix.find_in(Path({str(snapshot)!r}))
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["row", "encoder", "shape"])
def test_a_changed_model_is_spilled_and_fingerprinted_as_it_is(case, change):
    original, model = case.plain(), case.plain()
    with torch.no_grad():
        if change == "row":
            matrix_of(model)[7] += 1
        elif change == "shape":
            positions = model.base_model.embeddings.position_embeddings
            model.base_model.embeddings.position_embeddings = torch.nn.Embedding(
                positions.num_embeddings * 2, positions.embedding_dim
            )
        else:
            model.base_model.encoder.layer[1].output.dense.weight += 1
    base, before = make_base(model), make_base(original)
    assert base.matrix.find_in(Path(case.folder)) is None
    assert_same([torch.cat(list(base.matrix.iterate_blocks()))], [matrix_of(model)])
    ids = torch.tensor([7, 8])
    assert not torch.equal(
        base.make_fingerprint(ids, include_newly_initialized=True),
        before.make_fingerprint(ids, include_newly_initialized=True),
    )


def test_live_and_stored_fingerprints_agree(case):
    stored, model = make_base(case.plain()), case.plain()
    model.config._name_or_path = ""
    live = make_base(model)
    ids = torch.tensor(USED)
    left, right = (
        Fingerprint.from_array(base.make_fingerprint(ids, include_newly_initialized=True).numpy())
        for base in (stored, live)
    )
    assert left == right
    assert (left.embedding, left.prefix, left.vocab_size) == (NAME, "bert", V)
    assert "encoder.layer.1.output.dense.weight" in left.tensors


def test_spilled_rows_leave_no_file_and_are_shared_by_copies(tmp_path, monkeypatch):
    import copy
    import pickle

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = MappedRows.spill(torch.arange(12.0).view(4, 3).bfloat16())
    assert list(tmp_path.iterdir()) == []
    assert rows.read_rows(torch.tensor([3, 0])).tolist() == [[9, 10, 11], [0, 1, 2]]
    assert copy.deepcopy(rows) is rows
    with pytest.raises(SurgeryError, match="cannot be pickled"):
        pickle.dumps(rows)
