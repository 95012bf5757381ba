"""A model that adapters supports only through a user's own AdapterModelInterface: OLMo."""

import adapters
import pytest
import torch
from adapters import AdapterModelInterface, ConfigUnion, LoRAConfig, SeqBnConfig
from transformers import OlmoConfig, OlmoForCausalLM

import pema_adapters
from pema_adapters import PEMAConfig

V = 120
INTERFACE = AdapterModelInterface(
    adapter_methods=["bottleneck", "lora"],
    model_embeddings="embed_tokens",
    model_layers="layers",
    layer_self_attn="self_attn",
    layer_cross_attn=None,
    attn_k_proj="k_proj",
    attn_q_proj="q_proj",
    attn_v_proj="v_proj",
    attn_o_proj="o_proj",
    layer_intermediate_proj="mlp.up_proj",
    layer_output_proj="mlp.down_proj",
)
DATA = [{"input_ids": [3, 5, 8, 13, 21]}]
BATCH = {"input_ids": torch.tensor([DATA[0]["input_ids"]]), "labels": torch.tensor([DATA[0]["input_ids"]])}
UNSEEN = torch.tensor([[3, 77, 8, 100, 21]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("olmo")
    OlmoForCausalLM(config).save_pretrained(folder)
    return folder


def with_adapters(folder):
    model = OlmoForCausalLM.from_pretrained(folder)
    adapters.init(model, interface=INTERFACE)
    return model


@pytest.mark.parametrize("method", [LoRAConfig(r=2), SeqBnConfig()], ids=["lora", "seq_bn"])
def test_from_training_to_merged(base, tmp_path, method):
    model = with_adapters(base)
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), method))
    used = pema_adapters.shrink_embeddings(model, "task", DATA).token_ids.tolist()
    assert used == [0, 1, 3, 5, 8, 13, 21]
    model.train_adapter("task")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = model.eval()(UNSEEN).logits
        model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
        again = with_adapters(base)
        again.load_adapter(str(tmp_path / "run"), set_active=True, use_safetensors=True)
        assert torch.equal(again.eval()(UNSEEN).logits, trained)
        report = pema_adapters.merge_checkpoint(base, tmp_path / "run", tmp_path / "merged")
        merged = (
            with_adapters(tmp_path / "merged")
            if report.adapters_left
            else OlmoForCausalLM.from_pretrained(report.output)
        )
        for name in report.adapters_left:
            merged.load_adapter(f"{report.output}/adapters/{name}", set_active=True, use_safetensors=True)
        torch.testing.assert_close(merged.eval()(UNSEEN).logits, trained, atol=1e-6, rtol=1e-5)
    assert report.rows_merged == len(used)
