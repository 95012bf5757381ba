"""The partial embedding as a module: precision, copies, state dicts, autograd, compilation, ids without a row."""

import copy

import numpy as np
import pytest
import torch

from pema_adapters import PartialVocabulary, PEMAConfig, load_model
from pema_adapters.errors import TokenRangeError, UnseenTokenError
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from tests.models import MIXED, SEEN, USED, V, assert_same, batch, matrix_of, outputs
from tests.training.test_shrink import perturb, rows_of, shrunk


def test_half_precision_reads_the_same_rows(case):
    full = case.auto_class.from_pretrained(case.folder, dtype=torch.bfloat16)
    model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V), dtype=torch.bfloat16)
    assert matrix_of(model).dtype == torch.bfloat16
    assert_same([model.get_input_embeddings()(MIXED["input_ids"])], [full.get_input_embeddings()(MIXED["input_ids"])])


def test_unseen_error_names_the_ids_and_exempts_inserted_ones(case):
    model = shrunk(case, PEMAConfig(unseen="error"))
    outputs(model, batch([[3, 0, 118]]))
    with pytest.raises(UnseenTokenError, match=r"4 token ids are outside the partial vocabulary \(2, 4, 99, 119\)"):
        outputs(model, MIXED)


def test_deepcopy_to_and_state_dict(case):
    model = shrunk(case)
    twin = copy.deepcopy(model)
    perturb(model)
    assert_same(outputs(twin, MIXED), outputs(case.with_adapters(), MIXED))
    twin.load_state_dict(model.state_dict())
    assert_same(outputs(twin, MIXED), outputs(model, MIXED))
    assert twin.base_model.pema.embedding is twin.get_input_embeddings()
    for moved in (model.to("cpu"), model.double()):
        assert outputs(moved, MIXED)[0].dtype == moved.dtype


def test_a_full_state_is_not_loaded_as_rows(case):
    state = case.plain().state_dict()
    for model in (shrunk(case), load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))):
        with pytest.raises(RuntimeError, match=r"size mismatch for bert\.embeddings\.word_embeddings\.weight"):
            model.load_state_dict(state, strict=False)


def test_gradient_checkpointing_and_autocast_give_the_full_model_s_gradients(case):
    def gradient(model, weight):
        model.train()
        model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16):
            model(**SEEN).logits.float().sum().backward()
        return weight.grad

    full = case.plain()
    expected = gradient(full, matrix_of(full))
    model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))
    found = gradient(model, matrix_of(model))
    ids = model.get_input_embeddings().token_ids.long()
    assert_same([found], [expected[ids]])


def test_a_compiled_model_has_the_same_outputs(case):
    model = shrunk(case)
    perturb(model)
    compiled = torch.compile(model, backend="eager")
    assert_same(outputs(compiled, MIXED), outputs(model, MIXED))


class Synchronisations(torch.utils._python_dispatch.TorchDispatchMode):
    """Records operations that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
        ):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_training_step_of_the_embedding_does_not_synchronise(case):
    model = shrunk(case)
    model.train_adapter("task")
    embedding = model.get_input_embeddings()
    embedding(SEEN["input_ids"])
    with Synchronisations() as seen:
        embedding(SEEN["input_ids"]).sum().backward()
    assert seen.found == []


def test_ids_outside_the_matrix_are_refused(case):
    model = shrunk(case)
    for wrong in (-1, V):
        with pytest.raises(TokenRangeError, match=f"token id {wrong}, but the embedding has rows 0 to 119"):
            outputs(model, batch([[3, wrong]]))


def test_embedding_prints_what_is_in_memory(case):
    model = shrunk(case)
    assert isinstance(model.get_input_embeddings(), PartialEmbedding)
    assert "120, 32, padding_idx=0, 0 rows in memory" in repr(model.get_input_embeddings())
    assert "10 of 120 rows, 32" in repr(rows_of(model))
    assert np.all(np.diff(rows_of(model).token_ids.numpy()) > 0)
