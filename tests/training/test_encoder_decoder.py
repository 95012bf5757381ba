"""EncoderDecoderModel: two models with a vocabulary each; PEMA shrinks the encoder's."""

import adapters
import pytest
import torch
from adapters import ConfigUnion, LoRAConfig
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

import pema_adapters
from pema_adapters import PEMAConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct from a tensor", "ignore:Version v4.12.0 introduces"
)  # of Transformers' own class

V, DECODER_V = 120, 150
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
DATA = [{"input_ids": [3, 5, 8, 13, 100], "labels": [4, 6, 149]}]
"""Token id 149 is a row of the decoder's matrix only."""
USED = [0, 1, 2, 3, 5, 8, 13, 100]
"""The ids that the encoder reads, and those that the config inserts."""
BATCH = {name: torch.tensor([ids]) for name, ids in DATA[0].items()}
UNSEEN = {"input_ids": torch.tensor([[3, 77, 8, 13, 100]]), "labels": torch.tensor([[4, 7, 80]])}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    encoder = BertConfig(vocab_size=V, **SIZES)
    decoder = BertConfig(vocab_size=DECODER_V, is_decoder=True, add_cross_attention=True, **SIZES)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 2, 1
    folder = tmp_path_factory.mktemp("base")
    EncoderDecoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base):
    model = EncoderDecoderModel.from_pretrained(base)
    adapters.init(model)
    return model


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(**UNSEEN).logits


def test_an_adapter_from_training_to_merged(model, base, tmp_path):
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), LoRAConfig()))
    assert pema_adapters.shrink_embeddings(model, "task", DATA).token_ids.tolist() == USED
    assert not [name for name, tensor in model.state_dict().items() if tensor.shape[:1] == (V,)]
    model.train_adapter("task")
    trained = logits(train(model))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    again = EncoderDecoderModel.from_pretrained(base)
    adapters.init(again)
    again.load_adapter(str(tmp_path / "run"), set_active=True, use_safetensors=True)
    assert torch.equal(logits(again), trained)
    report = pema_adapters.merge_checkpoint(base, tmp_path / "run", tmp_path / "merged")
    assert (report.rows_merged, report.tensors_folded) == (len(USED), 12)
    merged = EncoderDecoderModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, atol=1e-6, rtol=0)


def test_full_fine_tuning(base, tmp_path):
    model = pema_adapters.load_model(EncoderDecoderModel, base, DATA)
    assert model.encoder.embeddings.word_embeddings.weight.shape == (len(USED), 32)
    assert model.decoder.bert.embeddings.word_embeddings.weight.shape == (DECODER_V, 32)
    trained = logits(train(model.train()))
    pema_adapters.save_delta(model, tmp_path / "run")
    pema_adapters.merge_checkpoint(base, tmp_path / "run", tmp_path / "merged")
    assert torch.equal(logits(EncoderDecoderModel.from_pretrained(tmp_path / "merged")), trained)


def test_restore_gives_the_original_model(model, base):
    before = logits(model)
    names = set(model.state_dict())
    model.add_adapter("task", config=PEMAConfig())
    pema_adapters.shrink_embeddings(model, "task", DATA)
    model.set_active_adapters("task")
    assert torch.equal(logits(model), before)
    pema_adapters.restore_embeddings(model)
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == names
    assert not model.add_base_adapters


def test_generation_is_unchanged(model):
    model.add_adapter("task", config=PEMAConfig())
    before = model.eval().generate(BATCH["input_ids"], max_length=6)
    pema_adapters.shrink_embeddings(model, "task", DATA)
    model.set_active_adapters("task")
    assert torch.equal(model.generate(BATCH["input_ids"], max_length=6), before)
