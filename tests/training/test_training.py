"""Training equals that of the full matrix bit for bit, with every trainer, and resumed runs equal uninterrupted ones."""

import numpy as np
import pytest
import torch
from adapters import AdapterTrainer, ConfigUnion
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, default_data_collator, set_seed

import pema_adapters
from pema_adapters import PartialVocabulary, PEMAConfig, load_model, restore_embeddings, save_delta, shrink_embeddings
from pema_adapters.errors import SurgeryError
from tests.models import MIXED, USED, V, assert_same, matrix_of, outputs
from tests.training.test_shrink import COMPACTER

ADAPTER = ConfigUnion(PEMAConfig(), COMPACTER)


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.0,
        "max_grad_norm": 0.0, "save_strategy": "no", "logging_strategy": "no", "report_to": [], "seed": 5,
        "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def run(trainer_class, model, data, folder, resume=None, **changes):
    trainer = trainer_class(
        model=model, args=arguments(folder, **changes), train_dataset=data, eval_dataset=data,
        data_collator=default_data_collator,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def partial_model(case):
    set_seed(2)
    return load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))


def adapter_model(case):
    model = case.with_adapters()
    set_seed(2)
    model.add_adapter("task", config=ADAPTER)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    return model


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "deberta-v2"])
def test_full_fine_tuning_is_bit_for_bit_that_of_the_full_matrix(make_case, data, tmp_path, family):
    case = make_case(family)
    set_seed(2)
    full = case.plain()
    run(Trainer, full, data, tmp_path / "full")
    model = partial_model(case)
    run(Trainer, model, data, tmp_path / "partial")
    restore_embeddings(model)
    expected = full.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(matrix_of(full), matrix_of(case.plain()))


def test_a_plain_loop_with_sgd_and_decay_agrees_on_used_rows(case, data):
    def steps(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        for first in range(0, 12, 4):
            rows = data[first : first + 4]
            model(**{name: torch.tensor(value) for name, value in rows.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    full, model = case.plain(), partial_model(case)
    steps(full), steps(model)
    ids = model.get_input_embeddings().token_ids.long()
    assert_same([matrix_of(model)], [matrix_of(full)[ids]])


def big_tensors(folder):
    found = []
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif path.suffix in (".bin", ".pt") and "training_args" not in path.name and "rng" not in path.name:
            state = torch.load(path, weights_only=False)
        else:
            continue
        found += [(path.name, key) for key, tensor in flat(state) if V in tensor.shape]
    return found


def flat(state, prefix=""):
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        if torch.is_tensor(value):
            yield f"{prefix}{key}", value
        else:
            yield from flat(value, f"{prefix}{key}.")


@pytest.mark.parametrize(
    ("trainer_class", "make"), [(AdapterTrainer, adapter_model), (Trainer, adapter_model), (Trainer, partial_model)]
)
@pytest.mark.parametrize("safe", [True, False])
def test_resumed_training_equals_the_uninterrupted_run(case, data, tmp_path, trainer_class, make, safe):
    whole = make(case)
    settings = {"save_strategy": "steps", "save_steps": 3, "save_safetensors": safe}
    run(trainer_class, whole, data, tmp_path / "run", **settings)
    assert big_tensors(tmp_path / "run") == []
    resumed = make(case)
    run(trainer_class, resumed, data, tmp_path / "again", str(tmp_path / "run" / "checkpoint-3"), **settings)
    expected = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("trainer_class", "make"), [(AdapterTrainer, adapter_model), (Trainer, partial_model)])
def test_load_best_model_at_end(case, data, tmp_path, trainer_class, make):
    model = make(case)
    trainer = run(
        trainer_class, model, data, tmp_path, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=0.5,
    )  # fmt: skip
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_a_trainer_checkpoint_is_not_mistaken_for_a_model(case, data, tmp_path):
    run(Trainer, partial_model(case), data, tmp_path, save_strategy="steps", save_steps=6)
    with pytest.raises(RuntimeError, match="size mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")


@pytest.mark.parametrize("make", [adapter_model, partial_model])
@pytest.mark.parametrize("safe", [True, False])
def test_save_pretrained_writes_an_ordinary_checkpoint(case, data, tmp_path, make, safe):
    model = make(case)
    trainer = run(AdapterTrainer if make is adapter_model else Trainer, model, data, tmp_path / "run")
    if make is partial_model and safe:
        trainer.save_model(str(tmp_path / "saved"))
    else:
        model.save_pretrained(tmp_path / "saved", safe_serialization=safe)
    before = outputs(model, MIXED)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert matrix_of(saved).shape[0] == V
    if make is partial_model:
        assert_same(outputs(saved, MIXED), before)
        assert set(saved.state_dict()) == set(case.plain().state_dict())
    else:
        assert_same([matrix_of(saved)], [matrix_of(case.plain())])
    assert_same(outputs(model, MIXED), before)
    assert not [path for path in (tmp_path / "saved").iterdir() if path.name.startswith(".")]


def test_save_pretrained_over_the_base_keeps_the_model_intact(make_case):
    case = make_case("roberta")
    model = partial_model(case)
    with torch.no_grad():
        matrix_of(model).add_(1)
    before = outputs(model, MIXED)
    model.save_pretrained(case.folder)
    assert_same(outputs(model, MIXED), before)
    assert_same(outputs(case.plain(), MIXED), before)


def test_a_failed_save_over_the_base_keeps_the_base(case, monkeypatch):
    model, before = partial_model(case), case.plain().state_dict()
    monkeypatch.setattr(
        "transformers.modeling_utils.safe_save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("full"))
    )
    with pytest.raises(OSError, match="full"):
        model.save_pretrained(case.folder)
    after = case.plain().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_save_delta_saves_the_trained_weights(case, data, tmp_path):
    model = partial_model(case)
    for parameter in model.base_model.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    run(Trainer, model, data, tmp_path / "run")
    save_delta(model, tmp_path / "delta")
    state = load_file(tmp_path / "delta" / "model.safetensors")
    name = "bert.embeddings.word_embeddings."
    assert state[name + "weight"].shape == matrix_of(model).shape
    assert state[name + "token_ids"].dtype == torch.int32
    assert not [key for key in state if ".layer.0." in key]
    assert "classifier.weight" in state and "bert.encoder.layer.1.output.dense.weight" in state
    assert np.array_equal(state[name + "token_ids"].numpy(), model.get_input_embeddings().token_ids.numpy())


def test_save_delta_over_the_base_is_refused(case):
    before = case.plain().state_dict()
    with pytest.raises(SurgeryError, match=r"would overwrite the base .*: choose another folder"):
        save_delta(partial_model(case), case.folder)
    after = case.plain().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_save_delta_of_an_adapter_model_is_told_what_to_call(case, tmp_path):
    with pytest.raises(SurgeryError, match=r"model\.save_adapter\(folder, name\)"):
        save_delta(adapter_model(case), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_public_names_exist():
    for name in pema_adapters.__all__:
        assert getattr(pema_adapters, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        pema_adapters.nothing_like_it  # noqa: B018
