"""Files that earlier versions wrote stay readable; those of newer versions are named as such."""

import json
import shutil
from pathlib import Path

import adapters
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification

import pema_adapters
from pema_adapters import PartialVocabulary, merge_checkpoint, undo_merge
from pema_adapters.errors import FormatError, MergeError
from pema_adapters.formats.delta import read_delta
from pema_adapters.formats.delta_discovery import find_delta
from tests.models import outputs

GOLDEN = Path(__file__).parent / "golden"
IDS = [0, 2, 3, 5, 8, 13, 21, 34]
E = "bert.embeddings.word_embeddings.weight"
PARTS = {"adapter": "bert.pema.adapters.task.", "full": "bert.embeddings.word_embeddings."}
WEIGHTS = {"adapter": "adapter.safetensors", "full": "model.safetensors"}
INPUTS = {"input_ids": torch.tensor([[2, 3, 5, 8], [13, 21, 34, 1]])}


@pytest.fixture(params=sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def golden(request, tmp_path, monkeypatch):
    """A copy of what one version wrote, as the current folder: the base is recorded as `base`."""
    shutil.copytree(GOLDEN / request.param, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden"


def test_a_vocabulary(golden):
    assert PartialVocabulary.load("train.vocabulary") == PartialVocabulary(IDS[1:], 40)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_delta_is_read_and_merged(golden, kind):
    delta = read_delta(kind)
    assert delta.token_ids.tolist() == IDS
    assert delta.fingerprint.embedding == E.removeprefix("bert.")
    merge_checkpoint("base", kind, "out", verify=True)
    merged, base = load_file("out/model.safetensors"), load_file("base/model.safetensors")
    rows = load_file(f"{kind}/{WEIGHTS[kind]}")[PARTS[kind] + "weight"]
    assert np.array_equal(merged[E][IDS], rows)
    others = np.setdiff1d(np.arange(40), IDS)
    assert np.array_equal(merged[E][others], base[E][others])


def test_an_adapter_is_loaded(golden, caplog):
    model = AutoModelForSequenceClassification.from_pretrained("base")
    adapters.init(model)
    model.load_adapter("adapter", set_active=True, use_safetensors=True)
    found = outputs(model, INPUTS)
    assert "another base" not in caplog.text
    merge_checkpoint("base", "adapter", "out")
    merged = AutoModelForSequenceClassification.from_pretrained("out")
    torch.testing.assert_close(found, outputs(merged, INPUTS))


def test_a_merge_in_place_is_undone(golden):
    undo_merge("in_place")
    for path in Path("base").iterdir():
        assert (golden / "in_place" / path.name).read_bytes() == path.read_bytes()
    assert not (golden / "in_place" / ".pema-undo").exists()


def test_an_output_is_known_as_one(golden):
    with pytest.raises(MergeError, match="exists from an earlier merge; replace it with --overwrite"):
        merge_checkpoint("base", "adapter", "merged")
    with pytest.raises(FormatError, match="the output of a merge"):
        find_delta(Path("merged"), None)
    merge_checkpoint("base", "adapter", "merged", overwrite=True)
    assert "model.safetensors" in {path.name for path in Path("merged").iterdir()}


def rewrite_fingerprint(kind, **changes):
    """Change the fingerprint of a delta in the current folder."""
    path = Path(kind) / WEIGHTS[kind]
    tensors, name = load_file(path), PARTS[kind] + "fingerprint"
    content = {**json.loads(tensors[name].tobytes()), **changes}
    tensors[name] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_delta_of_a_newer_version(golden, kind):
    path = rewrite_fingerprint(kind, version=2, tensors="laid out in another way")
    with pytest.raises(FormatError) as refused:
        merge_checkpoint("base", kind, "out")
    assert str(refused.value) == (
        f"{path}: tensor '{PARTS[kind]}fingerprint': written by a newer version of pema_adapters (format 2, this one "
        "reads up to 1); upgrade pema-adapters"
    )


def test_unknown_fields_of_a_fingerprint_are_ignored(golden):
    rewrite_fingerprint("adapter", added_later={"x": 1})
    assert merge_checkpoint("base", "adapter", "out").rows_merged == len(IDS)


def rewrite_vocabulary(**metadata):
    tensors = load_file("train.vocabulary")
    save_file(tensors, "train.vocabulary", {"format": "pema-vocabulary", "vocab_size": "40", **metadata})


def test_a_vocabulary_of_a_newer_version(golden):
    rewrite_vocabulary(version="2", vocab_size="in another way")
    with pytest.raises(FormatError) as refused:
        PartialVocabulary.load("train.vocabulary")
    assert str(refused.value) == (
        "train.vocabulary: written by a newer version of pema_adapters (format 2, this one reads up to 1); upgrade pema-adapters"
    )


def test_unknown_fields_of_a_vocabulary_are_ignored(golden):
    rewrite_vocabulary(added_later="x")
    assert len(PartialVocabulary.load("train.vocabulary")) == len(IDS) - 1


@pytest.mark.parametrize("version", [0, -1, "1", "x", 1.5, True, None, [1]])
def test_a_version_that_is_none(golden, version):
    rewrite_fingerprint("adapter", version=version)
    with pytest.raises(FormatError, match=r"its version is .*, expected 1 or more; the file is damaged"):
        read_delta("adapter")


def test_every_format_written_now_has_a_version(golden):
    vocabulary = PartialVocabulary([1, 2], 40)
    vocabulary.save("new.vocabulary")
    assert b'"version":"1"' in Path("new.vocabulary").read_bytes()
    model = pema_adapters.load_model(AutoModelForSequenceClassification, "base", vocabulary)
    pema_adapters.save_delta(model, "new")
    assert b'"version":1' in load_file("new/model.safetensors")[PARTS["full"] + "fingerprint"].tobytes()
    merge_checkpoint("base", "new", "out")
    assert json.loads(Path("out/pema_merge.json").read_bytes())["version"] == 1
    merge_checkpoint("base", "new", in_place=True)
    assert json.loads(Path("base/.pema-undo/journal.json").read_bytes())["version"] == 2
