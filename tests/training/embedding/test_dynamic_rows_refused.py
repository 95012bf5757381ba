"""Cases in which a vocabulary cannot grow: each is an error of one clear line."""

import adapters
import pytest
import torch
from transformers import BertForMaskedLM

from pema_adapters import PEMAConfig, restore_embeddings, shrink_embeddings
from pema_adapters.errors import SurgeryError, VocabularyError
from tests.models import CONFIGS, MIXED, SEEN, V, matrix_of
from tests.training.embedding.test_dynamic_rows import GROWS, full_model
from tests.training.test_shrink import rows_of


def test_growth_is_refused_after_the_matrix_was_restored(case):
    model = case.with_adapters()
    model.add_adapter("task", config=GROWS)
    shrink_embeddings(model, "task")
    model.train_adapter("task")
    model.set_active_adapters(None)
    restore_embeddings(model)
    model.set_active_adapters("task")
    with pytest.raises(SurgeryError, match="no vocabulary yet that could grow"):
        model.train()(**SEEN)


def tied(tmp_path, config):
    torch.manual_seed(3)
    BertForMaskedLM(CONFIGS["bert"]()).save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path)
    adapters.init(model)
    model.add_adapter("task", config=config)
    return model


def test_a_tied_output_is_refused_unless_it_keeps_the_base_matrix(tmp_path):
    model = tied(tmp_path, GROWS)
    for name, vocabulary in (("task", None), (None, "grow")):
        with pytest.raises(
            SurgeryError, match=r'output of BertForMaskedLM is tied .* use output_embeddings="full", or give'
        ):
            shrink_embeddings(model, name, vocabulary)
    assert matrix_of(model).shape[0] == V
    model = tied(tmp_path, PEMAConfig(vocabulary="grow", output_embeddings="full"))
    shrink_embeddings(model, "task")
    model.train_adapter("task")
    model.train()(**MIXED, labels=MIXED["input_ids"]).loss.backward()
    assert rows_of(model).weight.grad.shape[0] == len(rows_of(model)) == 9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: PEMAConfig(vocabulary="all"), ValueError, "PEMAConfig: vocabulary is 'all', expected \"grow\" or None"),
        (lambda m: PEMAConfig(vocabulary="grow", trainable=False), ValueError, "trainable=False trains none: leave out one"),
        (lambda m: shrink_embeddings(m, "task"), VocabularyError, r'no vocabulary: .* or use PEMAConfig\(vocabulary="grow"\)'),
        (lambda m: shrink_embeddings(m, "task", "grow"), VocabularyError, "no vocabulary: give shrink_embeddings a PartialVocabulary"),
        (lambda m: shrink_embeddings(m, None), VocabularyError, r'use shrink_embeddings\(model, None, "grow"\)'),
        (lambda m: m.train_adapter("grows"), SurgeryError, r'no vocabulary yet that could grow: call .*\(model, "grows"\) first'),
    ],
)  # fmt: skip
def test_errors_show_the_right_call(case, call, error, message):
    model = case.with_adapters()
    model.add_adapter("task", config="pema")
    model.add_adapter("grows", config=GROWS)
    with pytest.raises(error, match=message):
        call(model)
    assert matrix_of(model).shape[0] == V


def test_several_processes_are_refused(case):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = full_model(case).train()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(SurgeryError, match='vocabulary="grow" works in one process on one device'):
            model(**SEEN)
    finally:
        torch.distributed.destroy_process_group()
