"""Plain Transformers loads what a merge writes, and computes what the trained model computes."""

import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from pema_adapters import merge_checkpoint
from tests.merging.conftest import Base, T, noise, write

IDS = [1, 5, 6, 30]
INPUTS = torch.tensor([[1, 5, 7, 30, 2], [6, 6, 0, 31, 4]])


@pytest.fixture
def tiny():
    return BertConfig(vocab_size=32, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6,
                      max_position_embeddings=16, num_labels=3)  # fmt: skip


def based_on(folder, model, prefix=""):
    model.save_pretrained(folder)
    state = {name: T.of(tensor.detach().numpy()) for name, tensor in model.state_dict().items()}
    return Base(folder, {name: t for name, t in state.items() if "word_embeddings" in name or "encoder" in name})


def written(model, rows):
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS] = rows
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS).logits


def test_rows_and_head_onto_a_headless_base(make_adapter, tiny, tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny)
    base = based_on(tmp_path / "base", model.bert)
    head = {f"classifier.{name}": T.of(t.detach().numpy()) for name, t in model.classifier.named_parameters()}
    delta = make_adapter(base, ids=IDS, head=head, vocab_size=32)
    merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    merged, info = BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert merged.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert logits(merged).equal(logits(written(model, delta.rows.values)))


def test_a_masked_language_model_stays_tied(make_adapter, tiny, tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(tiny)
    base = based_on(tmp_path / "base", model)
    delta = make_adapter(base, ids=IDS, vocab_size=32)
    merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    merged, info = BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert merged.cls.predictions.decoder.weight is merged.bert.embeddings.word_embeddings.weight
    assert logits(merged).equal(logits(written(model, delta.rows.values)))


def test_a_grown_vocabulary_loads(make_adapter, tiny, tmp_path):
    torch.manual_seed(0)
    model = BertForMaskedLM(tiny)
    base = based_on(tmp_path / "base", model)
    delta = make_adapter(base, ids=[1, 32, 33], vocab_size=34)
    merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    model.resize_token_embeddings(34, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[[1, 32, 33]] = delta.rows.values
    merged, info = BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert logits(merged).equal(logits(model))


def test_a_pickled_artifact_is_the_same(make_adapter, tiny, tmp_path):
    from safetensors.torch import load_file

    base = based_on(tmp_path / "base", BertModel(tiny))
    delta = make_adapter(base, ids=IDS, head={"classifier.weight": T.of(noise(3, 4))}, vocab_size=32)
    first = merge_checkpoint(base.folder, delta.folder, tmp_path / "first")
    for name, pickled in (("adapter", "pytorch_adapter"), ("model_head", "pytorch_model_head")):
        torch.save(load_file(delta.folder / f"{name}.safetensors"), delta.folder / f"{pickled}.bin")
        (delta.folder / f"{name}.safetensors").unlink()
    second = merge_checkpoint(base.folder, delta.folder, tmp_path / "second")
    assert first.bytes_written == second.bytes_written
    assert (tmp_path / "first/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()


def test_what_an_earlier_loader_left_out_of_the_index_is_ignored(make_base, make_adapter, tmp_path):
    base = make_base(shards=2)
    write(base.folder / "model-00003-of-00003.safetensors", {"stray": T.of([1.0])})
    merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out")
    assert not (tmp_path / "out" / "model-00003-of-00003.safetensors").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == set(base.tensors)
