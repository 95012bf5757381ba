"""Adapters without a vocabulary are refused when they are saved; unseen tokens are counted in training."""

import pytest
import torch
from adapters import AdapterTrainer, ConfigUnion, LoRAConfig
from datasets import Dataset
from transformers import TrainingArguments

from pema_adapters import PartialVocabulary, PEMAConfig, load_model, merge_checkpoint, shrink_embeddings
from pema_adapters.errors import SurgeryError, VocabularyError
from pema_adapters.training.embedding.unseen_monitor import UnseenMonitor
from tests.models import MIXED, SEEN, USED, V

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def ours(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "pema_adapters.training.embedding.unseen_monitor"
    ]


def prepared(case, pema=None):
    model = case.with_adapters()
    model.add_adapter("task", config=pema or PEMAConfig())
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    return model.train()


@pytest.mark.parametrize("rows", [{"input_ids": []}, {"input_ids": [[], []]}])
def test_data_without_a_token_are_refused(case, rows):
    model = case.with_adapters()
    model.add_adapter("task", config="pema")
    with pytest.raises(VocabularyError, match=r"no token ids in the data: .* in input_ids, .*: give the token"):
        shrink_embeddings(model, "task", Dataset.from_dict(rows))
    scanned = PartialVocabulary.from_dataset(Dataset.from_dict(rows), vocab_size=V)
    with pytest.raises(VocabularyError, match="no vocabulary: give shrink_embeddings"):
        shrink_embeddings(model, "task", scanned)


def test_an_empty_batch_records_nothing():
    monitor = UnseenMonitor()
    monitor.record(torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0, dtype=torch.int64))
    monitor.sync()


def test_an_empty_split_beside_another_is_accepted():
    data = [Dataset.from_dict({"input_ids": []}), Dataset.from_dict({"input_ids": [[3, 5]]})]
    assert PartialVocabulary.from_dataset(data, vocab_size=V).token_ids.tolist() == [3, 5]


@pytest.mark.parametrize("form", ["adapter", "full", "loaded"])
def test_unseen_tokens_in_training_are_counted_and_reported_once(case, caplog, tmp_path, form):
    if form == "full":
        model = load_model(case.auto_class, case.folder, PartialVocabulary(USED, V)).train()
    else:
        model = prepared(case)
    if form == "loaded":
        model.save_adapter(str(tmp_path / "run"), "task")
        model = case.with_adapters()
        model.load_adapter(str(tmp_path / "run"), set_active=True)
        model.train_adapter("task")
        model.train()
    model(**SEEN)
    with torch.no_grad():
        model(**MIXED)
    assert not ours(caplog)
    for _ in range(2):
        model(**MIXED)
    (line,) = ours(caplog)
    assert line.startswith("4 of the first 16 tokens in training (25.0%) are outside the partial vocabulary: ")
    assert line.endswith('every split and column), or use PEMAConfig(vocabulary="grow")')


def test_evaluation_and_frozen_rows_do_not_warn(case, caplog):
    prepared(case).eval()(**MIXED)
    model = case.with_adapters()
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(trainable=False), LoRAConfig()))
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.train_adapter("task")
    model.train()(**MIXED)
    assert not ours(caplog)


def test_an_adapter_without_a_vocabulary_cannot_be_saved(case, tmp_path):
    model = case.with_adapters()
    model.add_adapter("task", config="pema")
    with pytest.raises(
        SurgeryError, match=r"no vocabulary yet: call pema_adapters\.shrink_embeddings\(model, \"task\", d"
    ):
        model.save_adapter(str(tmp_path / "run"), "task")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SurgeryError, match="no vocabulary yet"):
        model.push_adapter_to_hub("me/task", "task", datasets_tag="none")
    shrink_embeddings(model, "task", PartialVocabulary(USED, V))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    merge_checkpoint(case.folder, tmp_path / "run", tmp_path / "merged")


def test_a_trainer_saves_other_adapters_beside_one_without_a_vocabulary(case, data, tmp_path):
    model = case.with_adapters()
    model.add_adapter("later", config="pema")
    model.add_adapter("task", config=LoRAConfig(r=2))
    model.train_adapter("task")
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True)
    trainer = AdapterTrainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again = case.with_adapters()
    for name in ("later", "task"):
        again.load_adapter(str(tmp_path / "final" / name))
    again.load_adapter(str(tmp_path / "checkpoint-1" / "task"))


def test_frozen_rows_can_be_saved_without_a_vocabulary(case, tmp_path):
    model = case.with_adapters()
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(trainable=False), LoRAConfig()))
    model.save_adapter(str(tmp_path / "run"), "task")
