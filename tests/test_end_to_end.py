"""Training and merging together: merged checkpoints have the same outputs as the models that were trained."""

import adapters
import pytest
import torch
from adapters import AdapterTrainer, AutoAdapterModel, ConfigUnion, LoRAConfig
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, Trainer

from pema_adapters import (
    PartialVocabulary,
    PEMAConfig,
    load_model,
    merge_checkpoint,
    restore_embeddings,
    save_delta,
    shrink_embeddings,
)
from pema_adapters.errors import BaseMismatchError
from tests.models import CONFIGS, MIXED, SEEN, USED, Case, V, matrix_of, outputs
from tests.training.test_shrink import COMPACTER, perturb
from tests.training.test_training import run

FAMILIES = [family for family in CONFIGS if family != "xlm-roberta"]  # as roberta


def trained_adapter(case, config, folder, safe=True):
    """A model with a trained adapter, saved; its head is trained, too."""
    model = case.with_adapters()
    model.add_adapter("task", config=config)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    perturb(model)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_adapter(str(folder), "task", use_safetensors=safe)
    return model


def close(left, right):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_with_pema_only_merges_into_a_plain_checkpoint(make_case, tmp_path, family, safe):
    case = make_case(family)
    model = trained_adapter(case, PEMAConfig(), tmp_path / "run", safe)
    report = merge_checkpoint(case.folder, tmp_path / "run", verify=True)
    merged = AutoModelForSequenceClassification.from_pretrained(report.output)
    close(outputs(merged, MIXED), outputs(model, MIXED))
    restore_embeddings(model)
    assert torch.equal(matrix_of(merged), matrix_of(model))
    assert report.adapters_left == () and report.max_rounding_error == 0


@pytest.mark.parametrize("headless", [False, True])
def test_methods_that_cannot_be_folded_stay_an_adapter(case, tmp_path, headless):
    if headless:  # a base whose names have no prefix
        case.plain().base_model.save_pretrained(tmp_path / "headless")
        case.folder = str(tmp_path / "headless")
    model = trained_adapter(case, ConfigUnion(PEMAConfig(), COMPACTER), tmp_path / "run")
    report = merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    adapters.init(merged)
    merged.load_adapter(str(tmp_path / "merged" / "adapters" / "task"), set_active=True, use_safetensors=True)
    close(outputs(merged, MIXED), outputs(model, MIXED))
    assert report.adapters_left == ("task",)
    assert "pema" not in str(merged.adapters_config.get("task").to_dict())


@pytest.mark.parametrize("fold", [True, False])
def test_a_flexible_head_stays_with_the_adapter(case, tmp_path, fold):
    """Folding LoRA into the weights leaves the head alone."""
    model = AutoAdapterModel.from_pretrained(case.folder)
    model.add_classification_head("task", num_labels=3)
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), LoRAConfig(r=2)))
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    perturb(model)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "merged", fold=fold)
    merged = AutoAdapterModel.from_pretrained(tmp_path / "merged")
    left = str(tmp_path / "merged" / "adapters" / "task")
    if fold:
        merged.load_head(left, use_safetensors=True)
        merged.active_head = "task"
    else:
        merged.load_adapter(left, set_active=True, use_safetensors=True)
    close(outputs(merged, MIXED), outputs(model, MIXED))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_full_fine_tuning_equals_training_without_pema(make_case, data, tmp_path, family):
    case = make_case(family)
    full = case.plain()
    run(Trainer, full, data, tmp_path / "full")
    model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))
    run(Trainer, model, data, tmp_path / "partial")
    save_delta(model, tmp_path / "delta")
    merge_checkpoint(case.folder, tmp_path / "delta", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    expected = full.state_dict()
    assert set(expected) == set(merged.state_dict())
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("safe", [True, False])
def test_trainer_checkpoints_can_be_merged(case, data, tmp_path, safe):
    saving = {"save_strategy": "steps", "save_steps": 6, "save_safetensors": safe}
    model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))
    run(Trainer, model, data, tmp_path / "full", **saving)
    merge_checkpoint(case.folder, tmp_path / "full", tmp_path / "merged")
    close(
        outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), MIXED), outputs(model, MIXED)
    )

    model = case.with_adapters()
    model.add_adapter("task", config=PEMAConfig())
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    run(AdapterTrainer, model, data, tmp_path / "adapter", **saving)
    merge_checkpoint(case.folder, tmp_path / "adapter" / "checkpoint-6", tmp_path / "merged-adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged-adapter")
    close(outputs(merged, MIXED), outputs(model, MIXED))


def test_half_precision_training_merges_into_a_full_precision_base(case, tmp_path):
    model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V), dtype=torch.bfloat16)
    save_delta(model, tmp_path / "delta")
    report = merge_checkpoint(case.folder, tmp_path / "delta", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    ids = model.get_input_embeddings().token_ids.long()
    assert torch.equal(matrix_of(merged)[ids], matrix_of(model).float())
    assert report.rows_merged == len(ids) and report.vocab_size == V


def test_a_model_without_a_checkpoint_merges_into_one_saved_from_it(case, tmp_path):
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]())
    model.save_pretrained(tmp_path / "base")
    adapters.init(model)
    model.add_adapter("task", config="pema", set_active=True)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    perturb(model)
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    close(outputs(merged, MIXED), outputs(model, MIXED))
    with pytest.raises(BaseMismatchError, match="differ"):
        merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_averaged_adapters_can_be_merged(case, tmp_path):
    model = case.with_adapters()
    for name, ids in (("one", [3, 5]), ("two", [5, 99])):
        model.add_adapter(name, config="pema")
        shrink_embeddings(model, name, PartialVocabulary(ids, V))
        perturb(model, name)
    model.average_adapter("mean", ["one", "two"], set_active=True)
    model.save_adapter(str(tmp_path / "run"), "mean", use_safetensors=True)
    report = merge_checkpoint(case.folder, tmp_path / "run")
    assert report.rows_merged == 4
    merged = AutoModelForSequenceClassification.from_pretrained(report.output)
    close(outputs(merged, SEEN), outputs(model, SEEN))


def test_a_resized_vocabulary_resizes_the_checkpoint(case, tmp_path):
    model = case.with_adapters()
    model.resize_token_embeddings(V + 2, mean_resizing=False)
    model.add_adapter("task", config="pema", set_active=True)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V + 2))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert matrix_of(merged).shape[0] == merged.config.vocab_size == V + 2
    inputs = {name: value.clone() for name, value in MIXED.items()}
    inputs["input_ids"][0, 0] = V + 1
    close(outputs(merged, inputs), outputs(model, inputs))


def test_an_adapter_on_newly_initialized_weights_needs_a_base_that_has_them(tmp_path):
    torch.manual_seed(1)
    AutoModelForMaskedLM.from_config(CONFIGS["bert"]()).save_pretrained(tmp_path / "mlm")  # has no pooler
    case = Case(str(tmp_path / "mlm"), AutoModelForSequenceClassification)
    model = trained_adapter(case, PEMAConfig(), tmp_path / "run")
    with pytest.raises(BaseMismatchError, match=r"no tensor 'pooler\.dense\.weight'.* newly initialized"):
        merge_checkpoint(case.folder, tmp_path / "run")
    model.save_pretrained(tmp_path / "whole")
    report = merge_checkpoint(tmp_path / "whole", tmp_path / "run")
    close(outputs(AutoModelForSequenceClassification.from_pretrained(report.output), MIXED), outputs(model, MIXED))


def test_a_full_delta_contains_newly_initialized_weights_even_if_frozen(tmp_path):
    torch.manual_seed(1)
    AutoModelForMaskedLM.from_config(CONFIGS["bert"]()).save_pretrained(tmp_path / "mlm")
    model = load_model(AutoModelForSequenceClassification, tmp_path / "mlm", PartialVocabulary(USED, V))
    model.base_model.pooler.requires_grad_(False)
    save_delta(model, tmp_path / "delta")
    merge_checkpoint(tmp_path / "mlm", tmp_path / "delta", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    close(outputs(merged, MIXED), outputs(model, MIXED))
