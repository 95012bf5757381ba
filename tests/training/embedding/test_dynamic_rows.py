"""Growing vocabularies: training adds rows, and the run equals one after scanning the data beforehand."""

import gc

import pytest
import torch
from adapters import AdapterTrainer, ConfigUnion
from datasets import Dataset
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration, Trainer, set_seed

from pema_adapters import (
    PEMAConfig,
    load_model,
    shrink_embeddings,
)
from pema_adapters.errors import SurgeryError
from tests.models import MIXED, V, assert_same, live_tensors_of_shape, matrix_of, outputs
from tests.training.test_shrink import COMPACTER, rows_of
from tests.training.test_training import run

GROWS = PEMAConfig(vocabulary="grow")


@pytest.fixture
def data():
    """Data with new tokens in later rows: row i has ids up to 10 + 4 i."""
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(1, 10 + 4 * i, (7,), generator=generator).tolist() for i in range(24)]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * 7] * 24, "labels": [i % 2 for i in range(24)]}
    ).with_format("torch")


def adapter_model(case, data=None, config=PEMAConfig):
    """A model with a growing vocabulary; with `data`, one scanned beforehand."""
    model = case.with_adapters()
    set_seed(2)
    model.add_adapter("task", config=ConfigUnion(GROWS if data is None else config(), COMPACTER))
    shrink_embeddings(model, "task", data)
    model.train_adapter("task")
    return model


def full_model(case, data=None):
    set_seed(2)
    return load_model(case.auto_class, case.folder, "grow" if data is None else data)


def table_of(model):
    return rows_of(model) if hasattr(model.base_model, "pema") else model.get_input_embeddings()


def loop(model, data, optimizer=None, steps=range(6), accumulate=1, make=torch.optim.AdamW, **settings):
    model.train()
    optimizer = optimizer or make([p for p in model.parameters() if p.requires_grad], **{"lr": 0.01, **settings})
    for step in steps:
        for micro in range(accumulate):
            first = (step * accumulate + micro) * 4 % 24
            model(**data[first : first + 4]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def assert_same_run(grown, scanned):
    """Assert that all weights are equal, for tokens that both tables have."""
    ours, theirs = table_of(grown), table_of(scanned)
    places = torch.searchsorted(theirs.token_ids, ours.token_ids)
    assert torch.equal(theirs.token_ids[places], ours.token_ids) and len(ours.token_ids) > 10
    assert torch.equal(theirs.weight[places], ours.weight)
    expected = scanned.state_dict()
    for name, tensor in grown.state_dict().items():
        if not name.endswith(("token_ids", "fingerprint")) and tensor.shape != ours.weight.shape:
            assert torch.equal(tensor, expected[name]), name


MODELS = pytest.mark.parametrize("make", [adapter_model, full_model])


@pytest.mark.parametrize(
    ("make", "accumulate", "optimizer", "settings"),
    [
        (adapter_model, 1, torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True}),
        (adapter_model, 3, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (full_model, 3, torch.optim.AdamW, {"weight_decay": 0.0}),
        (full_model, 1, torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    ],
)
def test_a_training_loop_equals_one_after_a_scan(case, data, make, accumulate, optimizer, settings):
    grown, scanned = make(case), make(case, data)
    assert table_of(grown).token_ids.tolist() == [0]
    for model in (grown, scanned):
        loop(model, data, accumulate=accumulate, make=optimizer, **settings)
    assert_same_run(grown, scanned)


@MODELS
@pytest.mark.parametrize("as_keyword", [False, True])
def test_rows_can_be_added_in_a_closure(case, data, make, as_keyword):
    """Forward and backward happen within the step, as Lightning calls every optimizer."""
    grown, scanned = make(case), make(case, data)
    for model in (grown, scanned):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
        for first in range(0, 24, 4):
            closure = backward(model, optimizer, data[first : first + 4])
            loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
            assert loss.requires_grad
    assert_same_run(grown, scanned)


def backward(model, optimizer, rows):
    def closure():
        optimizer.zero_grad()
        loss = model(**rows).loss
        loss.backward()
        return loss

    return closure


@MODELS
def test_lbfgs_is_refused_when_rows_are_added(case, data, make):
    model = make(case)
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.01, max_iter=2)
    model.train()
    optimizer.step(backward(model, optimizer, data[:4]))
    optimizer.step(backward(model, optimizer, data[:4]))
    with pytest.raises(SurgeryError, match=r"LBFGS keeps 'd' .* cannot be remapped from \d+ rows to \d+: train with"):
        optimizer.step(backward(model, optimizer, data[20:24]))


@pytest.mark.parametrize(
    ("trainer_class", "make", "settings"),
    [
        (AdapterTrainer, adapter_model, {"gradient_accumulation_steps": 2}),
        (Trainer, full_model, {"max_grad_norm": 1e3}),
    ],
)
def test_trainers_on_a_stream_equal_those_after_a_scan(case, data, tmp_path, trainer_class, make, settings):
    grown, scanned = make(case), make(case, data)
    for model in (grown, scanned):
        run(trainer_class, model, data.to_iterable_dataset(), tmp_path, **settings)
    assert_same_run(grown, scanned)


@pytest.mark.parametrize(
    ("trainer_class", "make", "safe"), [(AdapterTrainer, adapter_model, False), (Trainer, full_model, True)]
)
def test_a_resumed_run_continues_to_grow(case, data, tmp_path, trainer_class, make, safe):
    whole, again, scanned = make(case), make(case), make(case, data)
    settings = {"save_strategy": "steps", "save_steps": 2, "save_safetensors": safe, "max_steps": 4}
    run(trainer_class, whole, data, tmp_path / "run", **settings)
    run(trainer_class, again, data, tmp_path / "again", str(tmp_path / "run" / "checkpoint-2"), **settings)
    run(trainer_class, scanned, data, tmp_path / "scanned", **settings)
    assert_same_run(again, scanned)
    assert torch.equal(table_of(again).token_ids, table_of(whole).token_ids)
    saved = torch.load(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"].values()
    assert not [state for state in saved if state["exp_avg"].shape == table_of(whole).weight.shape]  # it grew since


def test_the_best_checkpoint_is_loaded_with_its_own_rows(case, data, tmp_path):
    model = full_model(case)
    trainer = run(
        Trainer, model, data, tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=0.5, per_device_train_batch_size=2,
    )  # fmt: skip
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def embedding_of(case):
    return full_model(case).get_input_embeddings().train()


def meet(embedding, *ids):
    return embedding(torch.tensor(ids)).sum()


def test_a_row_decays_from_the_step_that_adds_it(case):
    embedding, base = embedding_of(case), matrix_of(case.plain()).detach()
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, weight_decay=0.5)
    for token_id in (3, 8):
        meet(embedding, token_id).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert embedding.token_ids.tolist() == [0, 3, 8]
    expected = [base[0] * 0.95 * 0.95, (base[3] * 0.95 - 0.1) * 0.95, base[8] * 0.95 - 0.1]
    torch.testing.assert_close(embedding.weight.detach(), torch.stack(expected))


def test_only_training_adds_rows(case):
    model = full_model(case)
    embedding, full = model.get_input_embeddings(), case.plain()
    assert_same(outputs(model, MIXED), outputs(full, MIXED))
    with torch.no_grad():
        assert_same([model.train()(**MIXED).logits], [full.train()(**MIXED).logits])
    assert embedding.token_ids.tolist() == [0] and not live_tensors_of_shape((V, 64))
    assert_same([model(**MIXED).logits], [full(**MIXED).logits])
    assert embedding.token_ids.tolist() == [0, 2, 3, 4, 8, 21, 55, 99, 119]


def test_no_full_matrix_is_alive(case):
    model = adapter_model(case)
    loss = model.train()(**MIXED, labels=torch.tensor([0, 1])).loss
    loss.backward()
    gc.collect()
    assert not live_tensors_of_shape((V, 32))


def test_a_pending_gradient_and_an_older_graph_are_remapped(case):
    embedding = embedding_of(case)
    meet(embedding, 5, 9).backward()
    older = 2 * meet(embedding, 9)
    newer = 4 * meet(embedding, 3, 9)
    assert embedding.weight.grad[:, 0].tolist() == [0, 0, 1, 1]  # of 0 3 5 9
    (older + newer).backward()
    assert embedding.weight.grad[:, 0].tolist() == [0, 4, 1, 7]
    meet(embedding, 2, 3).backward()
    assert embedding.weight.grad[:, 0].tolist() == [0, 1, 5, 1, 7]


def test_gradient_checkpointing_uses_the_added_rows(case):
    embedding = embedding_of(case)
    for reentrant in (False, True):
        ids, scale = torch.tensor([7, 30 + reentrant]), torch.ones(1, requires_grad=True)
        checkpoint(lambda ids, scale: (embedding(ids) * scale).sum(), ids, scale, use_reentrant=reentrant).backward()
    assert embedding.token_ids.tolist() == [0, 7, 30, 31]
    assert embedding.weight.grad[:, 0].tolist() == [0, 2, 1, 1]


def test_encoder_and_decoder_add_rows_to_one_table(tmp_path, data):
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0,
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    data = data.map(lambda row: {"labels": (row["input_ids"] + 11).tolist()})
    grown, scanned = (load_model(T5ForConditionalGeneration, tmp_path, made) for made in ("grow", data))
    for model in (grown, scanned):
        loop(model, data, weight_decay=0.0)
    assert_same_run(grown, scanned)
