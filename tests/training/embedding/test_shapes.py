"""The checks of conftest.py notice a wrong dtype, and sizes that do not agree."""

import pytest
import torch

from pema_adapters import PartialVocabulary, load_model
from pema_adapters.training.embedding.row_index import RowIndex
from tests.models import USED, V

jaxtyping = pytest.importorskip("jaxtyping")


@pytest.fixture
def embedding(case):
    return load_model(case.auto_class, case.folder, PartialVocabulary(USED, V)).get_input_embeddings()


def test_float_ids_are_refused(embedding):
    with pytest.raises(jaxtyping.TypeCheckError):
        embedding(torch.tensor([3.0]))


def test_rows_without_ids_are_refused(embedding):
    ids, rows = torch.tensor([3, 5]), torch.zeros(3, embedding.embedding_dim)
    with pytest.raises(jaxtyping.TypeCheckError):
        embedding.add_rows(ids, rows)


def test_int64_token_ids_of_an_index_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        RowIndex(torch.tensor([3, 5]))


def test_calls_with_the_declared_shapes_pass(embedding):
    assert embedding(torch.tensor([[3, 5], [8, 13]])).shape == (2, 2, embedding.embedding_dim)
