"""The loss and all gradients of a language model with K rows on both sides equal those of the full model."""

import pytest
import torch

from pema_adapters import PartialVocabulary, load_model
from pema_adapters.training.output import head_matrix
from pema_adapters.training.output.lazy_logits import LazyLogits
from tests.training.output.families import CAUSAL, FAMILIES, IDS, LABELS, USED, V, save_base
from tests.training.output.shapes import RecordShapes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

CASTS_TO_FLOAT32 = {*CAUSAL, "modernbert"}
"""Families whose own loss functions cast logits to float32."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(head_matrix, "BLOCK_ROWS", 50)


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_full_model(name, tmp_path):
    auto_class = save_base(name, tmp_path)
    full = auto_class.from_pretrained(tmp_path, dtype=torch.float64)
    partial = load_model(auto_class, tmp_path, PartialVocabulary(USED, V), dtype=torch.float64)
    expected, found = (model(input_ids=IDS, labels=LABELS) for model in (full, partial))
    expected.loss.backward()
    found.loss.backward()
    assert isinstance(found.logits, LazyLogits)
    assert not found.logits.is_real
    tolerance = 3e-7 if name in CASTS_TO_FLOAT32 else 1e-14
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=tolerance)
    embedding, matrix = partial.get_input_embeddings(), full.get_input_embeddings().weight
    torch.testing.assert_close(
        embedding.weight.grad, matrix.grad[embedding.token_ids.long()], rtol=tolerance, atol=tolerance
    )
    others = dict(partial.named_parameters())
    for parameter_name, parameter in full.named_parameters():
        if parameter.grad is not None and parameter is not matrix:
            gradient = others[parameter_name].grad
            torch.testing.assert_close(gradient, parameter.grad, rtol=tolerance, atol=tolerance, msg=parameter_name)
    torch.testing.assert_close(found.logits + 0, expected.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gemma2", "t5"])
def test_nothing_of_full_size_is_in_memory_at_any_time(name, tmp_path):
    """Neither E [V, d] nor logits [N, V], in a forward and a backward pass."""
    auto_class = save_base(name, tmp_path)
    model = load_model(auto_class, tmp_path, PartialVocabulary(USED, V), dtype=torch.float32)
    with RecordShapes() as recorder:
        model(input_ids=IDS, labels=LABELS).loss.backward()
    assert recorder.find_with(V) == []
    assert any(head_matrix.BLOCK_ROWS in shape for shape in recorder.shapes)
