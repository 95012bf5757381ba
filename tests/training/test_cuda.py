"""On a GPU: no synchronisation per step, and unseen tokens are reported at a later step or before a save."""

import pytest
import torch

from pema_adapters import PartialVocabulary, load_model, restore_embeddings
from pema_adapters.errors import UnseenTokenError
from tests.models import MIXED, SEEN, USED, V, assert_same, matrix_of, outputs, with_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def model(case):
    return load_model(case.auto_class, case.folder, PartialVocabulary(USED, V)).cuda().train()


def on_device(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def test_outputs_equal_those_of_the_full_model(case, model):
    with torch.no_grad():
        matrix_of(model).mul_(1.5)
    oracle = with_rows(case.plain().cuda(), model.get_input_embeddings().token_ids, matrix_of(model))
    for inputs in (SEEN, MIXED):
        assert_same(outputs(model, on_device(inputs)), outputs(oracle, on_device(inputs)))
    restore_embeddings(model)
    assert_same([matrix_of(model)], [matrix_of(oracle)])


def test_a_training_step_never_waits_for_the_device(model):
    inputs, optimizer = on_device(SEEN), torch.optim.AdamW(model.parameters(), fused=True)
    for strict in (False, True):
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            model(**inputs).logits.sum().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_unseen_tokens_in_training_are_reported_at_a_later_step(model):
    model(**on_device(MIXED))
    torch.cuda.synchronize()
    with pytest.raises(UnseenTokenError, match="held token id 119, which is outside the partial vocabulary"):
        model(**on_device(SEEN))


def test_unseen_tokens_in_training_are_reported_before_anything_is_saved(model):
    model(**on_device(SEEN))
    model(**on_device(MIXED))
    with pytest.raises(UnseenTokenError, match="token id 119"):
        model.state_dict()
