"""Cases in which load_model has to load the matrix: the model is shrunk afterwards, and equals from_pretrained's."""

import pytest
import torch
from transformers import AutoModel

from pema_adapters import load_model
from tests.models import MIXED, V, assert_same, matrix_of, outputs
from tests.training.test_load_model import VOCABULARY, D, assert_same_but_for_the_matrix, seeded


def assert_loaded_whole(model_class, folder, **kwargs):
    """Assert that a matrix that must be loaded or initialized is, with the same random state."""
    partial = seeded(load_model, model_class, folder, VOCABULARY, **kwargs)
    full = seeded(model_class.from_pretrained, folder, **kwargs)
    assert len(matrix_of(partial)) < V
    assert_same(outputs(partial, MIXED), outputs(full, MIXED))
    assert_same_but_for_the_matrix(partial, full)


def test_a_pickle_that_cannot_be_read_in_place_is_loaded_whole(case, tmp_path):
    AutoModel.from_pretrained(case.folder).save_pretrained(tmp_path / "base", safe_serialization=False)
    file = tmp_path / "base" / "pytorch_model.bin"
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert_loaded_whole(case.auto_class, tmp_path / "base")


def without_matrix(case, folder, matrix=None):
    model = case.plain()
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.shape != (V, D)}
    model.save_pretrained(folder, state_dict=state | ({} if matrix is None else {WORDS: matrix}))
    return folder


WORDS = "bert.embeddings.word_embeddings.weight"


def test_a_newly_initialized_matrix_is_loaded_whole(case, tmp_path):
    assert_loaded_whole(case.auto_class, without_matrix(case, tmp_path / "none"))
    short = without_matrix(case, tmp_path / "short", torch.zeros(V - 1, D))
    assert_loaded_whole(case.auto_class, short, ignore_mismatched_sizes=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_model(case.auto_class, short, VOCABULARY)


@pytest.mark.parametrize("name", ["word_embeddings", "the_embeddings"])
def test_a_matrix_under_another_name_is_loaded_whole(case, tmp_path, name):
    """The name after the mapping counts, not the name in the file."""
    state = dict(case.plain().state_dict())
    state["other.weight"], state[WORDS] = state[WORDS], torch.zeros(V, D)
    if name not in WORDS:
        del state[WORDS]
    case.plain().save_pretrained(tmp_path / "base", state_dict=state)
    mapping = {r"^bert\.embeddings\.word_embeddings\.weight$": "unused", r"^other\.weight$": WORDS}
    assert_loaded_whole(case.auto_class, tmp_path / "base", key_mapping=mapping)


def test_a_state_dict_is_loaded_whole(case):
    full = case.plain()
    how = {"state_dict": full.state_dict(), "config": full.config}
    model = load_model(type(full), None, VOCABULARY, **how)
    assert len(matrix_of(model)) < V
    assert_same(outputs(model, MIXED), outputs(full, MIXED))
