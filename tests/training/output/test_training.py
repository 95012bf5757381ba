"""Training a language model with K rows on both sides is training the full model with the other rows frozen."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from pema_adapters import PartialVocabulary, load_model
from pema_adapters.training.output import head_matrix
from tests.training.output.families import IDS, LABELS, USED, V, save_base

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(head_matrix, "BLOCK_ROWS", 50)


@pytest.fixture
def make(tmp_path):
    """A model with K rows, and the full one, of whose matrix the other rows get no gradient."""

    def make(name, dtype=torch.float64, **options):
        auto_class = save_base(name, tmp_path / "base")
        partial = load_model(auto_class, tmp_path / "base", PartialVocabulary(USED, V), dtype=dtype, **options)
        full = auto_class.from_pretrained(tmp_path / "base", dtype=dtype)
        trained = torch.zeros(V, 1, dtype=dtype)
        trained[partial.get_input_embeddings().token_ids.long()] = 1
        full.get_input_embeddings().weight.register_hook(lambda gradient: gradient * trained)
        return partial, full

    return make


def assert_same_weights(partial, full, **tolerance):
    embedding = partial.get_input_embeddings()
    matrix = full.get_input_embeddings().weight
    torch.testing.assert_close(embedding.weight, matrix[embedding.token_ids.long()], **tolerance)
    others = dict(full.named_parameters())
    for name, parameter in partial.named_parameters():
        if parameter is not embedding.weight:
            torch.testing.assert_close(parameter, others[name], msg=name, **tolerance)


@pytest.mark.parametrize("storage", ["disk", "host"])
@pytest.mark.parametrize("name", ["bert", "gemma2", "t5", "gpt2"])
def test_twenty_steps_equal_full_training(make, name, storage):
    models = make(name, output_storage=storage)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0) for model in models]
    history = []
    for _ in range(20):
        losses = [model(input_ids=IDS, labels=LABELS).loss for model in models]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append([loss.item() for loss in losses])
    history = np.array(history)
    assert history[-1, 0] < history[0, 0] - 0.05
    tolerance = 1e-9 if name in ("bert", "t5") else 1e-5
    np.testing.assert_allclose(history[:, 0], history[:, 1], rtol=tolerance)
    assert_same_weights(*models, rtol=100 * tolerance, atol=tolerance)


ROWS = Dataset.from_list(
    [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100, *ids[1:]]}
        for ids in np.random.default_rng(0).choice(USED, (24, 6)).tolist()
    ]
)


def compute_accuracy(prediction):
    predicted, labels = prediction.predictions, prediction.label_ids
    kept = labels != -100
    return {"accuracy": float((predicted == labels)[kept].mean())}


def run_trainer(model, folder, **options):
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "report_to": [],
        "logging_steps": 1, "eval_strategy": "epoch", "save_strategy": "no", "learning_rate": 1e-3, "use_cpu": True,
        "disable_tqdm": True, "seed": 3, **options,
    }  # fmt: skip
    trainer = Trainer(
        model, TrainingArguments(folder, **settings), train_dataset=ROWS, eval_dataset=ROWS.select(range(8)),
        compute_metrics=compute_accuracy, preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
    )  # fmt: skip
    trainer.train()
    return [
        [entry[name] for entry in trainer.state.log_history if name in entry]
        for name in ("loss", "eval_loss", "eval_accuracy")
    ]


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_a_trainer_reports_the_same_losses_and_metrics(make, tmp_path, name, options):
    partial, full = make(name, dtype=torch.float32)
    found, expected = (run_trainer(model, tmp_path / "out", **options) for model in (partial, full))
    assert all(len(values) > 1 for values in found)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4)
    assert_same_weights(partial, full, rtol=1e-2, atol=1e-3)


def test_predictions_of_a_trainer_are_real_logits(make, tmp_path):
    partial, full = make("bert", dtype=torch.float32)
    arguments = TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True, disable_tqdm=True)
    found, expected = (Trainer(model, arguments).predict(ROWS).predictions for model in (partial, full))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gemma2", "t5"])
def test_autocast(make, name):
    """The error against float32 is no larger than that of the full model."""
    partial, full = make(name, dtype=torch.float32)
    exact = full(input_ids=IDS, labels=LABELS).loss
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded = (model(input_ids=IDS, labels=LABELS) for model in (partial, full))
    assert found.logits.dtype == rounded.logits.dtype
    assert (found.loss - exact).abs() <= 2 * (rounded.loss - exact).abs() + 1e-3
    found.loss.backward()
    rounded.loss.backward()
    embedding = partial.get_input_embeddings()
    expected = full.get_input_embeddings().weight.grad[embedding.token_ids.long()]
    torch.testing.assert_close(embedding.weight.grad, expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gemma2", "qwen2", "t5"])
def test_a_model_in_half_precision(make, name, dtype):
    partial, full = make(name, dtype=dtype)
    found, expected = (model(input_ids=IDS, labels=LABELS) for model in (partial, full))
    assert (found.loss.dtype, found.logits.dtype) == (expected.loss.dtype, expected.logits.dtype)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.02, atol=0.02)
    torch.testing.assert_close(found.logits + 0, expected.logits, rtol=0.02, atol=0.02)
    for output in (found, expected):
        output.loss.backward()
    embedding = partial.get_input_embeddings()
    assert embedding.weight.grad.dtype == dtype
    gradient = full.get_input_embeddings().weight.grad[embedding.token_ids.long()]
    torch.testing.assert_close(embedding.weight.grad, gradient, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"do_sample": True, "top_k": 5, "temperature": 0.7},
                                     {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {"output_logits": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "t5"])
def test_generation_token_for_token(make, name, options):
    partial, full = make(name, dtype=torch.float32)
    made = []
    for model in (partial.eval(), full.eval()):
        torch.manual_seed(5)
        options = {"max_new_tokens": 8, "pad_token_id": 0, "return_dict_in_generate": True, **options}
        made.append(model.generate(IDS, **options))
    assert torch.equal(made[0].sequences, made[1].sequences)
    if "output_logits" in options:
        torch.testing.assert_close(torch.stack(made[0].logits), torch.stack(made[1].logits), rtol=1e-4, atol=1e-4)
