"""Parameter groups with a separate learning rate and weight decay for the embedding rows."""

import pytest
import torch
from adapters import ConfigUnion, LoRAConfig
from transformers import Trainer, TrainingArguments

from pema_adapters import PartialVocabulary, PEMAConfig, load_model, parameter_groups, shrink_embeddings
from pema_adapters.errors import SurgeryError
from tests.models import SEEN, USED, V, batch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def prepared(case, pema=None):
    model = case.with_adapters()
    model.add_adapter("task", config=ConfigUnion(pema or PEMAConfig(), LoRAConfig(r=2)))
    shrink_embeddings(model, "task", None if pema else PartialVocabulary(USED, V))
    model.train_adapter("task")
    return model


def rows_of(model):
    return model.base_model.pema.adapters["task"].weight


def test_every_trainable_parameter_is_in_one_group(case):
    model = prepared(case)
    rows, decayed, others = parameter_groups(model, lr=1e-3, embedding_lr=5e-5, weight_decay=0.1)
    assert rows["params"] == [rows_of(model)] and (rows["lr"], rows["weight_decay"]) == (5e-5, 0.0)
    assert (decayed["lr"], decayed["weight_decay"]) == (1e-3, 0.1)
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.0)
    names = {id(each): name for name, each in model.named_parameters() if each.requires_grad}
    assert sorted(names) == sorted(id(each) for group in (rows, decayed, others) for each in group["params"])
    assert {names[id(each)].rpartition(".")[2] for each in others["params"]} == {"bias"}


def test_without_rates_the_optimizer_default_applies(case):
    optimizer = torch.optim.AdamW(parameter_groups(prepared(case), embedding_lr=1e-5), lr=1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-2, 1e-2]


def test_full_fine_tuning(case):
    model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))
    rows, *_ = parameter_groups(model, embedding_lr=1e-5, embedding_weight_decay=0.01)
    assert rows == {"params": [model.get_input_embeddings().weight], "lr": 1e-5, "weight_decay": 0.01}


def test_added_rows_keep_their_learning_rate(case):
    model = prepared(case, PEMAConfig(vocabulary="grow"))
    optimizer = torch.optim.SGD(parameter_groups(model, embedding_lr=0.0, lr=0.1))
    for ids in ([[3, 5]], [[8, 13]]):
        model.train()(**batch(ids, [1])).loss.backward()
        optimizer.step()
    rows = model.base_model.pema.adapters["task"]
    assert {3, 5, 8, 13} <= set(rows.token_ids.tolist())
    base = case.plain().get_input_embeddings().weight
    assert torch.equal(rows.weight, base[rows.token_ids.long()])


def test_with_a_trainer(case, data, tmp_path):
    model = prepared(case)
    before = rows_of(model).detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, embedding_lr=0.0, lr=1e-2))
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    lora = next(each for name, each in model.named_parameters() if name.endswith("lora_B"))
    Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    assert torch.equal(rows_of(model), before) and lora.abs().sum() > 0


def test_a_model_whose_rows_do_not_train_is_refused(case):
    model = case.with_adapters()
    model.add_adapter("task", config=LoRAConfig())
    model.train_adapter("task")
    with pytest.raises(SurgeryError, match=r"no embedding row of .* trains: call shrink_embeddings and"):
        parameter_groups(model, embedding_lr=1e-5)


@pytest.mark.parametrize("config", ["pema|lora", "pema|compacter[reduction_factor=8,phm_dim=2]"])
def test_methods_named_by_a_string(case, config):
    model = case.with_adapters()
    model.add_adapter("task", config=config)
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    model.train()(**SEEN, labels=torch.tensor([0, 1])).loss.backward()
    assert rows_of(model).grad.abs().sum() > 0
    assert len(model.adapters_config.get("task").configs) == 2
