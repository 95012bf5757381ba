"""The weight of a tied head when it is read without calling the head: fused losses, DistributedDataParallel, copies."""

import copy
import subprocess
import sys

import adapters
import pytest
import torch
import torch.utils.checkpoint
from transformers import AutoModelForCausalLM, MambaConfig, MobileBertConfig, MobileBertForMaskedLM

from pema_adapters import PartialVocabulary, PEMAConfig, load_model, restore_embeddings, shrink_embeddings
from pema_adapters.errors import SurgeryError
from tests.training.output.test_tied_head import MIXED, MODELS, SEEN, USED, V, close, logits, make, train, with_adapter  # noqa: F401

WAY_OUT = r"needs the whole matrix; .*use_liger_kernel=False, or transformers.Trainer\), or call restore_embeddings"


def chunked_loss(model, ids, chunk=2):
    """Compute the loss as fused losses do: the backbone, then the head's weight, a few tokens at a time."""
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1].reshape(-1, 32)
    head, targets, total = model.get_output_embeddings(), ids[:, 1:].reshape(-1), 0.0
    hidden = hidden.to(head.weight.device).to(head.weight.dtype)
    for first in range(0, len(targets), chunk):
        scores = hidden[first : first + chunk] @ head.weight.T
        total = total + torch.nn.functional.cross_entropy(scores, targets[first : first + chunk], reduction="sum")
    return total / len(targets)


class Fused(torch.autograd.Function):
    """A loss with a backward of its own, which gets the weight as an argument."""

    @staticmethod
    def forward(ctx, hidden, weight):
        return torch.nn.functional.linear(hidden, weight).logsumexp(-1).sum()


def adapter(folder, auto_class):
    return with_adapter(folder, auto_class)


def full_fine_tuning(folder, auto_class):
    return load_model(auto_class, folder, PartialVocabulary(USED, V))


def loaded_over_the_full_matrix(folder, auto_class):
    trained = with_adapter(folder, auto_class)
    trained.save_adapter(str(folder / "run"), "task")
    model = auto_class.from_pretrained(folder)
    adapters.init(model)
    model.load_adapter(str(folder / "run"), set_active=True)
    model.train_adapter("task")
    return model


PREPARATIONS = [adapter, full_fine_tuning, loaded_over_the_full_matrix]


@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_a_chunked_loss_is_that_of_the_model(make, prepare):  # noqa: F811
    """The loss and the gradients of the trained rows; a loss with a backward of its own included."""
    model = prepare(*make("gpt2"))
    model.eval()
    rows = next(model.get_output_embeddings().embedding.iterate_tied_rows()).weight
    losses = [chunked_loss(model, SEEN), model(input_ids=SEEN, labels=SEEN).loss]
    close(*losses)
    if rows.requires_grad:
        close(*(torch.autograd.grad(loss, rows)[0] for loss in losses))
    hidden = torch.ones(1, 32, requires_grad=True)
    weight = model.lm_head.weight
    assert weight.requires_grad == weight.t().requires_grad == rows.requires_grad
    fused, expected = Fused.apply(hidden, weight), model.lm_head(hidden).logsumexp(-1).sum()
    close(fused, expected)
    close(torch.compile(lambda: hidden @ weight.T, backend="eager")() + 0, model.lm_head(hidden) + 0)


class Linear(torch.autograd.Function):
    """A product with a backward of its own, as in fused losses, which returns a gradient of the whole weight."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden)
        ctx.shape = weight.shape
        return torch.matmul(hidden, weight) + 0

    @staticmethod
    def backward(ctx, gradient):
        assert ctx.needs_input_grad[1]
        return None, ctx.saved_tensors[0].t() @ gradient


def test_a_gradient_of_the_whole_weight_reaches_the_rows(make):  # noqa: F811
    model = with_adapter(*make("gpt2"))
    rows, hidden = model.base_model.pema.adapters["task"].weight, torch.randn(3, 32)
    found, expected = Linear.apply(hidden, model.lm_head.weight.float().t()), model.lm_head(hidden) + 0
    close(found, expected)
    close(*(torch.autograd.grad(logits.pow(2).sum(), rows)[0] for logits in (found, expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_in_float32_as_trl_computes_them(make, dtype):  # noqa: F811
    """TRL 1.9: a checkpointed function of hidden states and weight, both cast to float32."""
    folder, auto_class = make("gpt2")
    model = load_model(auto_class, folder, PartialVocabulary(USED, V), dtype=dtype).eval()
    hidden = model.transformer(SEEN).last_hidden_state[:, :-1].reshape(-1, 32).detach().requires_grad_()
    targets, rows = SEEN[:, 1:].reshape(-1), model.get_input_embeddings().weight

    def chunk(hidden, weight, targets):
        logits = hidden.float() @ weight.float().t()
        log_p = torch.log_softmax(logits, dim=-1)
        return torch.nn.functional.nll_loss(log_p, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()

    checkpointed = torch.utils.checkpoint.checkpoint(chunk, hidden, model.lm_head.weight, targets, use_reentrant=False)
    weight = model.lm_head.weight[:].float()
    expected = chunk(hidden, weight, targets)
    assert checkpointed[1] == expected[1]
    close(checkpointed[0], expected[0])
    for one, other in zip(
        *(torch.autograd.grad(each[0], [hidden, rows]) for each in (checkpointed, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_what_needs_the_whole_matrix_is_refused(make, prepare):  # noqa: F811
    model = prepare(*make("gpt2"))
    for use in (
        lambda: model.lm_head.weight.data_ptr() + 1,
        lambda: model.lm_head.weight.data.normal_().sum(),
        lambda: torch.cat([model.lm_head.weight, torch.ones(1, 32)]),
        lambda: model.lm_head.weight + 1,
    ):
        with pytest.raises(SurgeryError, match=WAY_OUT):
            use()
    weight = model.lm_head.weight
    assert (weight.shape, weight.dtype, str(weight.device)) == ((V, 32), torch.float32, "cpu")
    assert repr(weight) == "HeadWeight(shape=(211, 32), dtype=torch.float32, device='cpu')"


def test_a_product_with_a_matrix_that_trains_as_a_whole_is_refused(make):  # noqa: F811
    """Its gradient would be lost; the head itself computes it."""
    model = loaded_over_the_full_matrix(*make("gpt2"))
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(SurgeryError, match=WAY_OUT):
        chunked_loss(model, SEEN)
    model(input_ids=SEEN, labels=SEEN).loss.backward()
    assert model.lm_head._parameters["weight"].grad.abs().sum(1).count_nonzero() == V - len(
        model.base_model.pema.adapters["task"]
    )


def test_rows_of_the_weight_can_be_read(make):  # noqa: F811
    model = with_adapter(*make("gpt2"))
    train(model)
    rows = model.base_model.pema.adapters["task"]
    restored = copy.deepcopy(model)
    restore_embeddings(restored)
    expected = restored.get_output_embeddings().weight
    ids = torch.tensor([[3, 200], [89, 5]])
    close(model.lm_head.weight[ids], expected[ids])
    close(model.lm_head.weight[2:9], expected[2:9])
    (gradient,) = torch.autograd.grad(model.lm_head.weight[ids].sum(), rows.weight)
    assert sorted(rows.token_ids[gradient.abs().sum(1) > 0].tolist()) == [3, 5, 89]


def test_a_fused_loss_is_correct_without_separate_rows(make):  # noqa: F811
    folder, auto_class = make("gpt2")
    untied = with_adapter(folder, auto_class, output_embeddings="full")
    train(untied)
    inactive = with_adapter(folder, auto_class)
    inactive.set_active_adapters(None)
    restored = load_model(auto_class, folder, PartialVocabulary(USED, V))
    train(restored)
    restore_embeddings(restored)
    for model in (untied, inactive, restored):
        model.eval()
        close(chunked_loss(model, SEEN), model(input_ids=SEEN, labels=SEEN).loss)


def test_the_matrix_is_no_buffer_of_a_distributed_model(make, tmp_path):  # noqa: F811
    """DistributedDataParallel broadcasts buffers at every forward."""
    model = with_adapter(*make("gpt2"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(input_ids=SEEN, labels=SEEN).loss.backward()
        assert not any(buffer.shape == (V, 32) for buffer in parallel.modules_buffers)
    finally:
        torch.distributed.destroy_process_group()
    assert model.base_model.pema.adapters["task"].weight.grad is not None


@pytest.mark.parametrize("storage", ["auto", "disk", "host", "device"])
def test_the_head_follows_the_model(make, storage):  # noqa: F811
    """To another dtype, into a copy, and from one storage to another."""
    model = with_adapter(*make("gpt2"), output_storage=storage)
    train(model)
    before = logits(model) + 0
    assert (model.lm_head._held is not None) == (storage in ("host", "device"))
    assert model.double().lm_head.weight.dtype == torch.float64
    close(logits(model).float(), before)
    twin = copy.deepcopy(model.float())
    assert twin.lm_head.embedding is twin.get_input_embeddings()
    close(logits(twin) + 0, before)
    shrink_embeddings(twin, None, PartialVocabulary(USED, V), output_storage="disk")
    assert twin.lm_head._held is None
    close(logits(twin) + 0, before)


def test_an_unknown_storage_is_refused(make):  # noqa: F811
    folder, auto_class = make("gpt2")
    with pytest.raises(
        SurgeryError, match=r"output_storage is 'gpu', expected one of 'auto', 'disk', 'host', 'device'"
    ):
        load_model(auto_class, folder, PartialVocabulary(USED, V), output_storage="gpu")
    with pytest.raises(ValueError, match=r"PEMAConfig: output_storage is 'gpu', expected \"auto\" or"):
        PEMAConfig(output_storage="gpu")


COMPILED = """
from pathlib import Path
import sys, torch
from tests.training.output.test_tied_head import MODELS, logits, with_adapter, train
config, auto_class = MODELS["gpt2"]
torch.manual_seed(3)
auto_class.from_config(config()).save_pretrained(sys.argv[1])
model = with_adapter(sys.argv[1], auto_class)
train(model)
torch.testing.assert_close(logits(torch.compile(model, backend="eager")), logits(model))
"""


@pytest.mark.slow
def test_a_compiled_language_model_has_the_same_outputs(tmp_path):
    """Runs in a separate process, because torch.compile would keep matrices alive that other tests look for."""
    subprocess.run([sys.executable, "-c", COMPILED, tmp_path], check=True)


def test_a_model_can_read_the_dtype_of_its_head(tmp_path):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=V, hidden_size=32, state_size=4, num_hidden_layers=1, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_model(AutoModelForCausalLM, tmp_path, PartialVocabulary(USED, V))
    close(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_a_head_that_uses_the_matrix_in_its_forward_is_refused(tmp_path):
    config = MobileBertConfig(
        vocab_size=V, hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        intra_bottleneck_size=16,
    )  # fmt: skip
    MobileBertForMaskedLM(config).save_pretrained(tmp_path)
    model = load_model(MobileBertForMaskedLM, tmp_path, PartialVocabulary(USED, V))
    with pytest.raises(SurgeryError, match=r"was used in .cat., which needs the whole matrix"):
        model(input_ids=MIXED)


def test_a_head_with_a_forward_of_its_own_is_refused(make):  # noqa: F811
    class Scaled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    folder, auto_class = make("gpt2")
    model = auto_class.from_pretrained(folder)
    model.lm_head.__class__ = Scaled
    adapters.init(model)
    with pytest.raises(SurgeryError, match=r"'lm_head' \(Scaled\) shares the matrix of the input embedding"):
        model.add_adapter("task", config=PEMAConfig())
        shrink_embeddings(model, "task", PartialVocabulary(USED, V))
