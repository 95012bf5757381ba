"""`merge_adapter` and `reset_adapter` with PEMA: the same outputs, and an exact way back."""

import copy

import adapters
import pytest
import torch
from adapters import ConfigUnion, DoRAConfig, IA3Config, LoRAConfig, VeraConfig
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, GPT2Config

from pema_adapters import PartialVocabulary, PEMAConfig, load_model, restore_embeddings, shrink_embeddings
from tests.models import CONFIGS, MIXED, SEEN, USED, V, assert_same, live_tensors_of_shape, matrix_of, outputs
from tests.training.test_shrink import perturb

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

VOCABULARY = PartialVocabulary(USED, V)
MERGEABLE = {
    "alone": [],
    "lora": [LoRAConfig(r=2, alpha=8, init_weights="bert")],
    "ia3": [IA3Config(init_weights="bert")],
    "dora": [DoRAConfig(r=2, alpha=8, init_weights="bert")],
    "vera": [VeraConfig(r=2, alpha=4)],
}
LANGUAGE_MODELS = {
    "bert": (CONFIGS["bert"], AutoModelForMaskedLM),
    "gpt2": (
        lambda: GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
        AutoModelForCausalLM,
    ),
}


@pytest.fixture
def base(tmp_path):
    """Makes a checkpoint whose biases are not 0; gives its folder and its class."""

    def make(config, auto_class=AutoModelForSequenceClassification):
        torch.manual_seed(3)
        model = auto_class.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "base")
        return tmp_path / "base", auto_class

    return make


def trained(base, *configs, pema=None, steps=3, **how):
    folder, auto_class = base
    torch.manual_seed(7)
    model = auto_class.from_pretrained(folder, **how)
    adapters.init(model)
    model.add_adapter("task", config=ConfigUnion(pema or PEMAConfig(), *configs) if configs else pema or PEMAConfig())
    shrink_embeddings(model, "task", VOCABULARY)
    model.train_adapter("task")
    train(model, steps)
    return model


def train(model, steps=3, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        outputs_of = model(**SEEN)
        outputs_of[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def close(one, other):
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert_same([one[name] for name in other], list(other.values()))


def plain(base, folder):
    return base[1].from_pretrained(folder)


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_merged_model_and_its_checkpoint_have_the_same_outputs(base, tmp_path, method):
    where = base(CONFIGS["bert"]())
    model = trained(where, *MERGEABLE[method])
    before = outputs(model, MIXED)
    model.merge_adapter("task")
    close(outputs(model, MIXED), before)
    model.save_pretrained(tmp_path / "out")
    close(outputs(plain(where, tmp_path / "out"), MIXED), before)
    model.reset_adapter()
    close(outputs(model, MIXED), before)
    model.set_active_adapters(None)
    base_model = plain(where, where[0])
    base_model.classifier.load_state_dict(model.classifier.state_dict())
    close(outputs(model, MIXED), outputs(base_model, MIXED))


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_fused_projection_is_merged(base, tmp_path, method):
    where = base(LANGUAGE_MODELS["gpt2"][0](), AutoModelForCausalLM)
    model = trained(where, *MERGEABLE[method])
    before = outputs(model, MIXED)[:1]
    model.merge_adapter("task")
    model.save_pretrained(tmp_path / "out")
    close(outputs(plain(where, tmp_path / "out"), MIXED)[:1], before)
    model.reset_adapter()
    close(outputs(model, MIXED)[:1], before)


@pytest.mark.parametrize("method", ["ia3", "dora"])
def test_biases_are_scaled_without_pema_as_well(base, method):
    where = base(CONFIGS["bert"]())
    model = plain(where, where[0])
    adapters.init(model)
    untouched = copy.deepcopy(model.state_dict())
    model.add_adapter("task", config=MERGEABLE[method][0], set_active=True)
    before = outputs(model, MIXED)
    model.merge_adapter("task")
    close(outputs(model, MIXED), before)
    model.reset_adapter()
    close(outputs(model, MIXED), before)
    again = model.state_dict()
    close([again[name] for name in untouched], list(untouched.values()))


@pytest.mark.parametrize("output", ["tied", "full"])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_tied_head_shares_the_merged_matrix(base, tmp_path, family, output):
    config, auto_class = LANGUAGE_MODELS[family]
    where = base(config(), auto_class)
    model = trained(where, LoRAConfig(r=2), pema=PEMAConfig(output_embeddings=output))
    before, tie = outputs(model, MIXED)[:1], model.config.tie_word_embeddings
    model.set_active_adapters(None)
    inactive = outputs(model, MIXED)[:1]
    model.set_active_adapters("task")
    model.merge_adapter("task")
    close(outputs(model, MIXED)[:1], before)
    model.save_pretrained(tmp_path / "out")
    close(outputs(plain(where, tmp_path / "out"), MIXED)[:1], before)
    model.reset_adapter()
    assert model.config.tie_word_embeddings is tie
    close(outputs(model, MIXED)[:1], before)
    model.set_active_adapters(None)
    close(outputs(model, MIXED)[:1], inactive)


def test_training_continues_unchanged_after_a_reset(base):
    where = base(CONFIGS["bert"]())
    one, other = trained(where, steps=0), trained(where, steps=0)
    optimizer = train(one)
    one.merge_adapter("task")
    assert one.get_input_embeddings().weight.shape == (V, 32)
    one.reset_adapter()
    assert one.get_input_embeddings().weight.shape == (0, 32) and not live_tensors_of_shape((V, 32))
    train(one, 3, optimizer)
    train(other, 3, train(other))
    assert_same_state(one.state_dict(), other.state_dict())


def test_rows_of_full_fine_tuning_are_restored(base):
    folder, auto_class = base(CONFIGS["bert"]())
    model = load_model(auto_class, folder, PartialVocabulary([3, 4, 5], V))
    with torch.no_grad():
        matrix_of(model).add_(1.0)
    adapters.init(model)
    model.add_adapter("task", config="pema", set_active=True)
    shrink_embeddings(model, "task", VOCABULARY)
    perturb(model)
    model.eval()
    before, state = outputs(model, MIXED), copy.deepcopy(model.state_dict())
    model.merge_adapter("task")
    close(outputs(model, MIXED), before)
    model.reset_adapter()
    assert_same_state(model.state_dict(), state)
    assert_same(outputs(model, MIXED), before)


@pytest.mark.parametrize("output", ["tied", "full"])
def test_an_adapter_loaded_into_a_full_model(base, tmp_path, output):
    where = base(CONFIGS["bert"](), AutoModelForMaskedLM)
    model = trained(where, pema=PEMAConfig(output_embeddings=output))
    model.save_adapter(str(tmp_path / "run"), "task", use_safetensors=True)
    expected = outputs(model, MIXED)
    full = plain(where, where[0])
    adapters.init(full)
    full.load_adapter(str(tmp_path / "run"), set_active=True)
    unmerged = copy.deepcopy(full.state_dict())
    full.merge_adapter("task")
    close(outputs(full, MIXED), expected)
    full.save_pretrained(tmp_path / "out")
    close(outputs(plain(where, tmp_path / "out"), MIXED), expected)
    full.reset_adapter()
    assert_same_state(full.state_dict(), unmerged)
    restore_embeddings(full)
    close(outputs(full, MIXED), expected)


def test_half_precision_with_rows_in_full(base, tmp_path):
    where = base(CONFIGS["bert"]())
    model = trained(where, pema=PEMAConfig(dtype="float32"), dtype=torch.bfloat16)
    before = outputs(model, MIXED)
    model.merge_adapter("task")
    assert_same(outputs(model, MIXED), before)
    model.save_pretrained(tmp_path / "out")
    assert_same(outputs(where[1].from_pretrained(tmp_path / "out", dtype=torch.bfloat16), MIXED), before)


def test_grown_rows_and_frozen_rows_are_merged(base):
    where = base(CONFIGS["bert"]())
    for pema in (PEMAConfig(vocabulary="grow"), PEMAConfig(trainable=False)):
        model = trained(where, LoRAConfig(r=2), pema=pema)
        before = outputs(model, MIXED)
        model.merge_adapter("task")
        close(outputs(model, MIXED), before)
        model.reset_adapter()
        train(model)
        assert torch.isfinite(outputs(model, MIXED)[0]).all()


def test_two_adapters_are_merged_one_after_the_other(base, tmp_path):
    where = base(CONFIGS["bert"]())
    model = trained(where)
    model.add_adapter("other", config="pema")
    shrink_embeddings(model, "other", PartialVocabulary([4, 99], V))
    perturb(model)
    for name in ("task", "other"):
        model.set_active_adapters(name)
        before = outputs(model, MIXED)
        model.merge_adapter(name)
        model.merge_adapter(name)  # a second merge has no effect, as in adapters
        assert_same(outputs(model, MIXED), before)
        model.save_pretrained(tmp_path / name)
        assert_same(outputs(plain(where, tmp_path / name), MIXED), before)
        model.reset_adapter()
        assert_same(outputs(model, MIXED), before)
