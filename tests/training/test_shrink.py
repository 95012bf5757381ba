"""Shrinking and restoring: same outputs for all tokens, no tensor [V, d] alive, and an exact way back."""

import copy
import gc
import weakref

import pytest
import torch
from adapters import AutoAdapterModel, CompacterConfig, ConfigUnion
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification

from pema_adapters import PartialVocabulary, PEMAConfig, load_model, restore_embeddings, shrink_embeddings
from pema_adapters.errors import SurgeryError, VocabularyError
from tests.models import (
    CONFIGS,
    HEADS,
    MIXED,
    SEEN,
    USED,
    V,
    assert_same,
    batch,
    live_tensors_of_shape,
    matrix_of,
    outputs,
    with_rows,
)  # fmt: skip

COMPACTER = CompacterConfig(reduction_factor=4, phm_dim=2)


def shrunk(case, config=None, vocabulary=None):
    model = case.with_adapters()
    model.add_adapter("task", config=config or PEMAConfig(), set_active=True)
    shrink_embeddings(model, "task", vocabulary or PartialVocabulary(USED, V))
    return model


def rows_of(model, name="task"):
    return model.base_model.pema.adapters[name]


def perturb(model, name="task"):
    torch.manual_seed(11)
    with torch.no_grad():
        rows_of(model, name).weight.add_(torch.randn_like(rows_of(model, name).weight))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", CONFIGS)
def test_outputs_equal_those_of_the_full_matrix_with_the_rows_written_in(make_case, family, head):
    case = make_case(family, head)
    full, model = case.with_adapters(), shrunk(case)
    assert_same(outputs(model, MIXED), outputs(full, MIXED))
    perturb(model)
    oracle = with_rows(full, rows_of(model).token_ids, rows_of(model).weight)
    for inputs in (SEEN, MIXED, batch([[0, 1], [2, V - 1]])):
        assert_same(outputs(model, inputs), outputs(oracle, inputs))
    model.set_active_adapters(None)
    assert_same(outputs(model, MIXED), outputs(full, MIXED))


@pytest.mark.parametrize("family", CONFIGS)
def test_full_fine_tuning_has_the_same_outputs(make_case, family):
    case = make_case(family)
    model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))
    embedding = model.get_input_embeddings()
    assert matrix_of(model).shape[0] == len(embedding.token_ids) < V
    with torch.no_grad():
        matrix_of(model).mul_(1.5)
    oracle = with_rows(case.plain(), embedding.token_ids, matrix_of(model))
    assert_same(outputs(model, MIXED), outputs(oracle, MIXED))


def test_no_tensor_of_the_full_matrix_is_alive(case):
    d = matrix_of(case.plain()).shape[1]
    before = len(live_tensors_of_shape((V, d)))
    full = case.with_adapters()
    matrix = weakref.ref(matrix_of(full).data.untyped_storage())
    full.add_adapter("task", config=ConfigUnion(PEMAConfig(), COMPACTER))
    shrink_embeddings(full, "task", PartialVocabulary(USED, V))
    full.train_adapter("task")
    full(**SEEN).logits.sum().backward()
    gc.collect()
    assert matrix() is None
    assert len(live_tensors_of_shape((V, d))) == before
    assert not [name for name, tensor in full.state_dict().items() if tensor.shape[:1] == (V,)]


def test_config_data_and_module_are_unchanged(case, data):
    model = case.with_adapters()
    module, config, rows = model.get_input_embeddings(), model.config.to_dict(), data.to_dict()
    model.add_adapter("task", config="pema")
    shrink_embeddings(model, "task", data)
    assert model.get_input_embeddings() is module
    assert model.config.to_dict() == config
    assert data.to_dict() == rows
    assert (module.num_embeddings, module.padding_idx) == (V, 0)


def test_ids_that_the_model_inserts_are_added(case, data):
    model = case.with_adapters()
    model.config.bos_token_id, model.config.eos_token_id, model.config.decoder_start_token_id = 101, [102, 103], None
    model.add_adapter("task", config="pema")
    used = shrink_embeddings(model, "task", DatasetDict(train=data, test=data))
    assert set(used.token_ids) == {*USED, 0, 101, 102, 103}


@pytest.mark.parametrize("trained", [False, True])
def test_restore_gives_the_full_model(case, trained):
    model, full = shrunk(case, ConfigUnion(PEMAConfig(), COMPACTER)), case.with_adapters()
    embedding = model.get_input_embeddings()
    expected = full
    if trained:
        perturb(model)
        expected = with_rows(full, rows_of(model).token_ids, rows_of(model).weight)
    before = outputs(model, MIXED)
    restore_embeddings(model)
    assert_same(outputs(model, MIXED), before)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert model.get_input_embeddings() is embedding
    assert_same([matrix_of(model)], [matrix_of(expected)])
    assert not hasattr(model.base_model, "pema")
    assert "pema" not in str(model.adapters_config.get("task").to_dict())
    assert vars(embedding).keys() == vars(expected.get_input_embeddings()).keys()


def test_restore_without_an_active_adapter_gives_the_base_and_keeps_the_rows(case):
    model = shrunk(case)
    perturb(model)
    with_task = outputs(model, MIXED)
    model.set_active_adapters(None)
    restore_embeddings(model)
    assert_same([matrix_of(model)], [matrix_of(case.plain())])
    model.set_active_adapters("task")
    assert_same(outputs(model, MIXED), with_task)


def test_restore_after_full_fine_tuning(case):
    model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))
    with torch.no_grad():
        matrix_of(model).mul_(2)
    ids, rows, before = model.get_input_embeddings().token_ids, matrix_of(model).clone(), outputs(model, MIXED)
    restore_embeddings(model)
    assert_same([matrix_of(model)], [matrix_of(with_rows(case.plain(), ids, rows))])
    assert_same(outputs(model, MIXED), before)


def test_restore_of_an_untouched_model_does_nothing(case):
    model = case.plain()
    restore_embeddings(model)
    assert_same([matrix_of(model)], [matrix_of(case.plain())])


def test_restore_refuses_to_change_the_base_of_another_adapter(case):
    model = shrunk(case)
    model.add_adapter("other", config="pema")
    shrink_embeddings(model, "other", PartialVocabulary([7], V))
    with pytest.raises(
        SurgeryError, match="rows of 'task' into the matrix would change the base under the rows of other"
    ):
        restore_embeddings(model)


def test_several_adapters_can_be_switched(case):
    model, full = shrunk(case), case.with_adapters()
    model.add_adapter("other", config="pema")
    shrink_embeddings(model, "other", PartialVocabulary([2, 4, 99], V))
    perturb(model), perturb(model, "other")
    for name in ("other", "task", "other"):
        model.set_active_adapters(name)
        oracle = with_rows(full, rows_of(model, name).token_ids, rows_of(model, name).weight)
        assert_same(outputs(model, MIXED), outputs(oracle, MIXED))
    with pytest.raises(SurgeryError, match="other, task are active together"):
        model.set_active_adapters(["task", "other"])
    model.delete_adapter("task")
    model.set_active_adapters(None)
    assert_same(outputs(model, MIXED), outputs(full, MIXED))


def test_shrinking_again_keeps_trained_rows_and_adds_new_ones(case):
    model = shrunk(case)
    perturb(model)
    trained = {int(i): row.clone() for i, row in zip(rows_of(model).token_ids, rows_of(model).weight, strict=True)}
    used = shrink_embeddings(model, "task", PartialVocabulary([4, 99], V))
    assert {4, 99, *trained} == set(used.token_ids.tolist())
    base = matrix_of(case.plain())
    for token_id, row in zip(rows_of(model).token_ids.tolist(), rows_of(model).weight, strict=True):
        assert torch.equal(row, trained.get(token_id, base[token_id]))


def test_a_model_from_elsewhere_is_its_own_base(make_case):
    torch.manual_seed(5)
    made = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())
    import adapters

    adapters.init(made)
    before = outputs(made, MIXED)
    made.add_adapter("task", config="pema", set_active=True)
    shrink_embeddings(made, "task", PartialVocabulary(USED, V))
    assert_same(outputs(made, MIXED), before)


def test_a_model_changed_since_loading_is_its_own_base(case, caplog):
    model = case.with_adapters()
    with torch.no_grad():
        matrix_of(model)[99] += 1
    before = outputs(model, MIXED)
    model.add_adapter("task", config="pema", set_active=True)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    assert_same(outputs(model, MIXED), before)
    assert "differs from its checkpoint" in caplog.text


def test_rows_added_by_a_resize_are_all_in_the_vocabulary(case):
    model = case.with_adapters()
    model.resize_token_embeddings(V + 3)
    with torch.no_grad():
        matrix_of(model)[V:] = torch.arange(3.0).unsqueeze(1)
    full = copy.deepcopy(model)
    model.add_adapter("task", config="pema", set_active=True)
    used = shrink_embeddings(model, "task", PartialVocabulary(USED, V + 3))
    assert {V, V + 1, V + 2} <= set(used.token_ids.tolist())
    ids = torch.tensor([[3, V + 1, 99, V + 2]])
    for active in ("task", None):
        model.set_active_adapters(active)
        assert_same([model.get_input_embeddings()(ids)], [full.get_input_embeddings()(ids)])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, v: shrink_embeddings(m, "nobody", v), SurgeryError, r"no adapter 'nobody' on this model \(found: task, plain\)"),
        (lambda m, v: shrink_embeddings(m, "plain", v), SurgeryError, "adapter 'plain' has no PEMA in its config"),
        (lambda m, v: shrink_embeddings(m, "task", PartialVocabulary([1], 5)), VocabularyError, "of 5 tokens, but .* has 120"),
        (lambda m, v: m.train_adapter("task"), SurgeryError, r'shrink_embeddings\(model, "task", dataset\)'),
        (lambda m, v: shrink_embeddings(m, "task", Dataset.from_dict({"input_ids": [[1], [120]]})), VocabularyError, "120"),
    ],
)  # fmt: skip
def test_errors_show_the_right_call(case, call, error, message):
    model = case.with_adapters()
    model.add_adapter("task", config="pema")
    model.add_adapter("plain", config=COMPACTER)
    with pytest.raises(error, match=message):
        call(model, PartialVocabulary(USED, V))
    assert matrix_of(model).shape[0] == V


def test_resize_of_a_shrunk_model_is_refused(case):
    model = shrunk(case)
    with pytest.raises(SurgeryError, match="resize before shrink_embeddings"):
        model.resize_token_embeddings(V + 8)
    model.resize_token_embeddings(V)


def test_a_tied_head_added_later_is_refused(case):
    model = AutoAdapterModel.from_pretrained(case.folder)
    model.add_adapter("task", config="pema")
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    with pytest.raises(SurgeryError, match=r"'heads\.mlm\.3' \(Linear\) is tied .*: add it before shrink_embeddings"):
        model.add_masked_lm_head("mlm")


def test_a_model_without_adapters_is_told_what_to_call(case):
    with pytest.raises(SurgeryError, match=r"call adapters\.init\(model\)"):
        shrink_embeddings(case.plain(), "task", PartialVocabulary(USED, V))
