"""Folded weights equal those of adapters' own merge_adapter, and the merged model computes what was trained."""

import copy

import adapters
import numpy as np
import pytest
import torch
from adapters import (
    CompacterConfig,
    ConfigUnion,
    DoRAConfig,
    DvoRAConfig,
    IA3Config,
    LoRAConfig,
    MTLLoRAConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    VeraConfig,
)  # fmt: skip
from safetensors.torch import load_file
from transformers import AutoModel, BartConfig, GPT2Config, LlamaConfig, T5Config
from transformers import AutoModelForSequenceClassification as Auto

import pema_adapters
from pema_adapters import merge_checkpoint
from pema_adapters.errors import BaseMismatchError, MergeError
from pema_adapters.merging.folding import folded_weight
from pema_adapters.merging.plan import segments
from tests.models import CONFIGS, USED, V, perturb_trained

SMALL = {"vocab_size": V}
MORE = {
    "gpt2": lambda: GPT2Config(
        **SMALL, n_embd=32, n_layer=2, n_head=2, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        pad_token_id=0,
    ),
    "llama": lambda: LlamaConfig(
        **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, pad_token_id=0
    ),
    "bart": lambda: BartConfig(
        **SMALL, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=40, dropout=0.0,
    ),
    "t5": lambda: T5Config(**SMALL, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0),
}  # fmt: skip
ALL = {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["q", "k", "v"]}
METHODS = {
    "lora": LoRAConfig(),
    "lora, everywhere, scaled": LoRAConfig(**ALL, r=4, alpha=12),
    "lora, not in layer 0": LoRAConfig(leave_out=[0], attn_matrices=["k"]),
    "dora": DoRAConfig(r=4, alpha=4),
    "ia3": IA3Config(),
    "ia3, only q": IA3Config(attn_matrices=["q"], intermediate_lora=False),
    "vera": VeraConfig(r=4, alpha=6),
    "dvora": DvoRAConfig(r=4, alpha=4),
}
FAMILIES = ["bert", "roberta", "distilbert", "deberta-v2", "electra", "albert", "bart", "llama", "gpt2"]
CANNOT = {("gpt2", "dora"), ("gpt2", "dvora"), ("gpt2", "vera"), ("albert", "lora, not in layer 0")}
INPUTS = torch.tensor([[*USED[:5], 2], [*USED[4:], 2]])


def noisy(model, scale=0.3):
    """Every parameter, zero biases among them, somewhere else: nothing agrees by accident."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale * parameter.std().nan_to_num(0.1).clamp(min=0.1))
    return model


def trained(tmp_path, family, config, dtype=torch.float32):
    """A base on disk, and the model with an adapter "task" whose every part is noise, saved to `run`."""
    torch.manual_seed(5)
    noisy(Auto.from_config((CONFIGS | MORE)[family]())).to(dtype).save_pretrained(tmp_path / "base")
    model = Auto.from_pretrained(tmp_path / "base", dtype=dtype)
    adapters.init(model)
    model.add_adapter("task", config=config, set_active=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".loras." in name or ".adapters." in name or "shared_parameters" in name or "prefix_tuning" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    shares = any(
        isinstance(member, PrefixTuningConfig) for member in getattr(config, "configs", [])
    )  # which safetensors refuses to write
    model.save_adapter(tmp_path / "run", "task", use_safetensors=not shares)
    return model.eval()


def hidden(model):
    with torch.no_grad():
        return model.eval()(input_ids=INPUTS)[0]


def merged_by_adapters(model):
    model = copy.deepcopy(model)
    model.merge_adapter("task")
    return {
        name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items() if "loras" not in name
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_folding_equals_merge_adapter(tmp_path, family, method):
    if (family, method) in CANNOT:
        pytest.skip("adapters cannot either")
    model = trained(tmp_path, family, METHODS[method])
    report = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out", verify=True)
    expected = merged_by_adapters(model)
    made = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name for name in made if not made[name].equal(base[name])}
    assert len([name for name in changed if name.endswith("weight")]) == report.tensors_folded > 0
    for name in made:
        if name.endswith("weight"):
            torch.testing.assert_close(made[name], expected[name], rtol=1e-6, atol=1e-6)
    assert report.adapters_left == ()
    merged = Auto.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", ["lora, everywhere, scaled", "ia3", "dora"])
def test_in_a_union_with_pema(tmp_path, method):
    torch.manual_seed(5)
    noisy(Auto.from_config(CONFIGS["roberta"]())).save_pretrained(tmp_path / "base")
    model = Auto.from_pretrained(tmp_path / "base")
    adapters.init(model)
    model.add_adapter("task", config=ConfigUnion(pema_adapters.PEMAConfig(), METHODS[method]), set_active=True)
    pema_adapters.shrink_embeddings(model, "task", [{"input_ids": USED}])
    model.train_adapter("task")
    perturb_trained(model)
    model.save_adapter(tmp_path / "run", "task", use_safetensors=True)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out", verify=True)
    assert report.rows_merged == len(USED) + 3 and report.tensors_folded > 0 and not report.adapters_left
    merged = Auto.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rest", [SeqBnConfig(reduction_factor=4), PrefixTuningConfig(prefix_length=3, flat=True), CompacterConfig(
    phm_dim=2, reduction_factor=4)], ids=["bottleneck", "prefix", "compacter"])  # fmt: skip
def test_what_cannot_be_folded_stays_beside_what_can(tmp_path, rest):
    model = trained(tmp_path, "bert", ConfigUnion(LoRAConfig(r=4, alpha=8), rest))
    report = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    assert report.adapters_left == ("task",) and report.tensors_folded == 4
    merged = Auto.from_pretrained(tmp_path / "out")
    adapters.init(merged)
    merged.load_adapter(str(tmp_path / "out" / "adapters" / "task"), set_active=True, use_safetensors=True)
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=2e-5, atol=2e-5)


def test_without_folding_the_adapter_stays_whole(tmp_path):
    model = trained(tmp_path, "bert", ConfigUnion(LoRAConfig(), SeqBnConfig(reduction_factor=4)))
    with pytest.raises(MergeError, match="nothing to merge: load it with load_adapter"):
        merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out", fold=False)
    assert model.active_adapters is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base(tmp_path, dtype):
    model = trained(tmp_path, "bert", LoRAConfig(**ALL, r=4, alpha=8), dtype)
    report = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out", verify=True)
    full = copy.deepcopy(model).float()
    full.merge_adapter("task")
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in full.state_dict().items():
        if name in made:
            assert made[name].equal(tensor.to(dtype)), name
    assert 0 < report.max_rounding_error < 0.05


@pytest.mark.parametrize("rows", [1, 3])
def test_blocks_of_any_size_give_the_same(tmp_path, rows, monkeypatch):
    trained(tmp_path, "bert", DoRAConfig(r=4, alpha=4))
    whole = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    monkeypatch.setattr(folded_weight, "CHUNK", 32 * 4 * rows)
    monkeypatch.setattr(segments, "CHUNK", 32 * 4 * rows + 7)
    small = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "small", verify=True)
    assert whole.tensors_folded == small.tensors_folded
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "small"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)


def test_a_gated_adapter_is_refused_by_name(tmp_path):
    trained(tmp_path, "bert", LoRAConfig(use_gating=True))
    with pytest.raises(MergeError, match=r"adapter 'task' is gated \(use_gating\).*--no-fold"):
        merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_multi_task_lora_is_not_folded(tmp_path):
    trained(tmp_path, "bert", MTLLoRAConfig())
    with pytest.raises(MergeError, match="nothing that folds into weights"):
        merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out")


def test_another_architecture_is_refused(tmp_path):
    trained(tmp_path, "bert", LoRAConfig())
    Auto.from_config(CONFIGS["roberta"]()).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="model_type is 'roberta', but the delta was trained on 'bert'"):
        merge_checkpoint(tmp_path / "other", tmp_path / "run", tmp_path / "out")


def test_a_smaller_base_is_refused(tmp_path):
    trained(tmp_path, "bert", LoRAConfig())
    Auto.from_config(CONFIGS["bert"]().__class__(**{**CONFIGS["bert"]().to_dict(), "num_hidden_layers": 1})
                          ).save_pretrained(tmp_path / "other")  # fmt: skip
    with pytest.raises(BaseMismatchError, match=r"the adapter changes bert.encoder.layer.1.* found no such tensor"):
        merge_checkpoint(tmp_path / "other", tmp_path / "run", tmp_path / "out")


def test_the_other_dtypes(tmp_path):
    """`dtype` casts what is folded, spliced or kept, once, from full precision."""
    trained(tmp_path, "bert", LoRAConfig())
    merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    report = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "half", dtype="bfloat16", verify=True)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "half"))
    for name in one:
        assert other[name].equal(one[name].bfloat16() if one[name].is_floating_point() else one[name])
    assert Auto.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert report.max_rounding_error == pytest.approx(
        max(float((one[n].double() - other[n].double()).abs().max()) for n in one if one[n].is_floating_point())
    )
    assert np.isfinite(report.max_rounding_error)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("trained_on", ["headed", "headless"])
@pytest.mark.parametrize("merged_into", ["headed", "headless"])
def test_names_match_with_and_without_prefix(tmp_path, family, trained_on, merged_into):
    torch.manual_seed(5)
    headed = noisy(Auto.from_config((CONFIGS | MORE)[family]()))
    headed.save_pretrained(tmp_path / "headed")
    headed.base_model.save_pretrained(tmp_path / "headless")
    loader = Auto if trained_on == "headed" else AutoModel
    model = loader.from_pretrained(tmp_path / "headed")
    adapters.init(model)
    model.add_adapter("task", config=LoRAConfig(r=4, alpha=8), set_active=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".loras." in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_adapter(tmp_path / "run", "task", use_safetensors=True)
    merge_checkpoint(tmp_path / merged_into, tmp_path / "run", tmp_path / "out", verify=True)
    merged = loader.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=2e-5, atol=2e-5)
