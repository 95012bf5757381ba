"""Lazy logits give what real ones give, whatever is done with them, and are computed only where they must be."""

import copy
import io

import pytest
import torch
from torch.nn import functional

from pema_adapters.errors import SurgeryError
from pema_adapters.io.input_file import InputFile
from pema_adapters.training.base.mapped_rows import MappedRows
from pema_adapters.training.output import head_matrix, logit_statistics, second_pass
from pema_adapters.training.output.head_matrix import HeadMatrix
from pema_adapters.training.output.lazy_logits import LazyLogits, make_lazy
from pema_adapters.training.output.logit_source import Source
from pema_adapters.training.output.transforms import AddBias
from tests.training.output.shapes import RecordShapes

V, D, K = 211, 16, 40
CPU = torch.device("cpu")
TARGETS = torch.tensor([[3, -100, 8, 13], [210, 34, 0, 89], [-100, -100, 7, 7]])
FLAT = TARGETS.view(-1)
KNOWN = TARGETS.clamp(min=0)
MASK = TARGETS != -100


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(head_matrix, "BLOCK_ROWS", 50)
    for module in (logit_statistics, second_pass):
        monkeypatch.setattr(module, "TOKEN_BLOCK", 5)


class Pair:
    """A head twice: lazy, and as a plain function of the same inputs."""

    def __init__(self, in_file, with_bias, dtype=torch.float64, trains=True):
        torch.manual_seed(1)
        self.holds_matrix = not in_file
        base = torch.randn(V, D, dtype=dtype)
        self.ids = torch.randperm(V)[:K].sort().values
        self.rows = torch.randn(K, D, dtype=dtype, requires_grad=trains)
        self.hidden = torch.randn(3, 4, D, dtype=dtype, requires_grad=trains)
        self.bias = torch.randn(V, dtype=dtype, requires_grad=trains) if with_bias else None
        matrix = HeadMatrix(
            MappedRows.spill(base) if in_file else base, self.rows, self.ids, self.ids, dtype, CPU, self.rows._version
        )
        parts = () if self.bias is None else (AddBias.of(self.bias),)
        self.lazy = make_lazy(Source(self.hidden, matrix, parts))
        self.real = functional.linear(self.hidden, base.index_copy(0, self.ids, self.rows), self.bias)
        self.inputs = [self.hidden, self.rows] if self.bias is None else [self.hidden, self.rows, self.bias]


@pytest.fixture(params=[(False, False), (True, False), (True, True)], ids=["memory", "file", "file-bias"])
def pair(request):
    return Pair(*request.param)


def cap(logits):
    return torch.tanh(logits / 5.0) * 5.0


def selective_log_softmax(logits, index):
    """Compute log-probabilities as TRL does."""
    selected = torch.gather(logits, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
    return selected - torch.stack([torch.logsumexp(each, dim=-1) for each in logits])


STREAMED = {
    "mean": lambda z: functional.cross_entropy(z.view(-1, V), FLAT),
    "sum": lambda z: functional.cross_entropy(z.view(-1, V), FLAT, reduction="sum"),
    "none": lambda z: functional.cross_entropy(z.reshape(-1, V), FLAT, reduction="none"),
    "module": lambda z: torch.nn.CrossEntropyLoss()(z.view(-1, z.size(-1)), FLAT),
    "another ignored index": lambda z: functional.cross_entropy(z.view(-1, V), KNOWN.view(-1), ignore_index=7),
    "smoothing": lambda z: functional.cross_entropy(z.view(-1, V), FLAT, label_smoothing=0.1),
    "capped": lambda z: functional.cross_entropy(cap(z).view(-1, V), FLAT),
    "capped, smoothing": lambda z: functional.cross_entropy(cap(z).view(-1, V), FLAT, label_smoothing=0.2),
    "scaled": lambda z: functional.cross_entropy((0.5 * z / 3).view(-1, V), FLAT),
    "biased": lambda z: functional.cross_entropy((z + torch.linspace(0, 1, V).double()).view(-1, V), FLAT),
    "shifted": lambda z: functional.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), TARGETS[..., 1:].reshape(-1)),
    "padded labels": lambda z: functional.cross_entropy(z.float().view(-1, V), FLAT).double(),
    "one token": lambda z: functional.cross_entropy(z[0, 0], TARGETS[0, 0]),
    "masked tokens": lambda z: functional.cross_entropy(z[MASK], TARGETS[MASK]),
    "log-sum-exp": lambda z: z.logsumexp(dim=-1, keepdim=True).pow(2),
    "gather": lambda z: z.gather(-1, KNOWN.unsqueeze(-1).repeat(1, 1, 3)).pow(2),
    "log-probabilities": lambda z: selective_log_softmax(z, KNOWN),
    "last token": lambda z: functional.cross_entropy(z[:, -1, :], KNOWN[:, -1]),
    "chunks": lambda z: torch.stack([functional.cross_entropy(each, KNOWN[0]) for each in z.chunk(3)[0]]),
    "double": lambda z: functional.cross_entropy(z.to(torch.float64, copy=True).flatten(0, 1), FLAT),
}  # fmt: skip
COMPUTED = {
    "square": lambda z: z.pow(2),
    "softmax": lambda z: z.softmax(-1),
    "log-softmax, gather": lambda z: z.log_softmax(-1).gather(-1, KNOWN.unsqueeze(-1)),
    "class weights": lambda z: functional.cross_entropy(z.view(-1, V), FLAT, weight=torch.linspace(1, 2, V).double()),
    "probabilities as targets": lambda z: functional.cross_entropy(z[0], torch.full((4, V), 1 / V).double()),
    "classes in the middle": lambda z: functional.cross_entropy(z.transpose(1, 2), TARGETS),
    "one column": lambda z: z[..., 5] + z[:, :, 7],
    "columns": lambda z: z[..., :100],
    "concatenation": lambda z: torch.cat([z, z.new_zeros(1, 4, V)]),
    "sum over tokens": lambda z: z.sum(1),
    "other shape": lambda z: z.reshape(-1).pow(2),
    "sum of two": lambda z: z + z,
    "per-token scale": lambda z: z * torch.linspace(1, 2, 4).double()[:, None],
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMED | COMPUTED)
def test_results_and_gradients_equal_those_of_real_logits(pair, name):
    function = (STREAMED | COMPUTED)[name]
    with RecordShapes() as recorder:
        found = function(pair.lazy)
    expected = function(pair.real)
    of_all_logits = [shape for shape in recorder.find_with(V) if shape != (V, D) or not pair.holds_matrix]
    assert bool(of_all_logits) == (name in COMPUTED)
    assert type(found) is torch.Tensor
    tolerance = 1e-6 if name == "padded labels" else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(1, 2, found.numel()).view_as(found).double()
    gradients = torch.autograd.grad((found * weights).sum(), pair.inputs, allow_unused=True)
    oracle = torch.autograd.grad((expected * weights).sum(), pair.inputs, allow_unused=True)
    for one, other in zip(gradients, oracle, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_argmax_and_topk_do_not_compute_all_logits(pair):
    assert torch.equal(pair.lazy.argmax(-1), pair.real.argmax(-1))
    assert torch.equal(pair.lazy.argmax(dim=2, keepdim=True), pair.real.argmax(-1, keepdim=True))
    with torch.no_grad():
        torch.testing.assert_close(pair.lazy.topk(7).values, pair.real.topk(7).values)
        assert torch.equal(torch.topk(pair.lazy, 7, dim=-1).indices, pair.real.topk(7).indices)
    assert not pair.lazy.is_real


def test_metadata_are_those_of_real_logits(pair):
    lazy, real = pair.lazy, pair.real
    for read in (lambda z: z.shape, lambda z: z.size(-1), lambda z: z.dtype, lambda z: z.device, len, lambda z: z.ndim,
                 lambda z: z.requires_grad, lambda z: z.numel(), torch.is_tensor, torch.is_floating_point):  # fmt: skip
        assert read(lazy) == read(real)
    assert lazy.float().dtype == torch.float32
    assert lazy.detach().requires_grad is False
    assert lazy[0].shape == (4, V)
    assert lazy[:, None].shape == (3, 1, 4, V)
    assert isinstance(lazy.unsqueeze(0).squeeze(0).transpose(0, 1), LazyLogits)
    assert not lazy.is_real


def test_detached_logits_pass_no_gradient(pair):
    functional.cross_entropy(pair.lazy.detach().view(-1, V), FLAT)
    loss = functional.cross_entropy(pair.lazy.detach().view(-1, V), FLAT) * pair.hidden.sum()
    assert torch.autograd.grad(loss, pair.rows, allow_unused=True) == (None,)


def test_writing_to_logits_changes_them(pair):
    lazy, real = pair.lazy, pair.real.clone()
    for logits in (lazy, real):
        logits[..., 7] = float("-inf")
        logits.add_(1)
    torch.testing.assert_close(lazy + 0, real)
    torch.testing.assert_close(functional.cross_entropy(lazy[0], KNOWN[0]), functional.cross_entropy(real[0], KNOWN[0]))


def test_copies_and_files_hold_real_logits():
    pair = Pair(in_file=True, with_bias=True, trains=False)
    buffer = io.BytesIO()
    torch.save(pair.lazy, buffer)
    buffer.seek(0)
    for found in (torch.load(buffer), copy.deepcopy(pair.lazy), torch.from_numpy(pair.lazy.numpy())):
        torch.testing.assert_close(found, pair.real)
        assert type(found) is torch.Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_without_a_graph_get_none_later(mode):
    """They were made where no graph is built, and are looked at where one is."""
    pair = Pair(in_file=True, with_bias=True)
    with mode():
        lazy = make_lazy(Source(pair.hidden.detach() * 1, pair.lazy.source.matrix, pair.lazy.source.parts))
    assert not lazy.requires_grad
    loss = functional.cross_entropy(lazy.view(-1, V), FLAT)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, functional.cross_entropy(pair.real.view(-1, V), FLAT).detach())
    torch.testing.assert_close(torch.from_numpy(lazy.numpy()), pair.real.detach())


def test_hooks_and_gradients_of_logits(pair):
    """Logits whose gradient is looked at are real from then on."""
    seen = []
    for logits in (pair.lazy, pair.real):
        logits.retain_grad()
        logits.register_hook(seen.append)
        functional.cross_entropy(logits.view(-1, V), FLAT).backward()
    torch.testing.assert_close(pair.lazy.grad, pair.real.grad)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("offset", [0, 3])
def test_rows_added_to_the_file_and_files_without_alignment(tmp_path, offset):
    """Rows that resize_token_embeddings added are in memory; tensors of a file may begin anywhere."""
    torch.manual_seed(2)
    base, hidden = torch.randn(V, D), torch.randn(3, D)
    (tmp_path / "rows").write_bytes(b"x" * offset + base[:-7].numpy().tobytes())
    file = InputFile(tmp_path / "rows")
    rows = MappedRows(file, offset, (V - 7, D), torch.float32).with_added_rows(base[-7:])
    lazy = make_lazy(Source(hidden, HeadMatrix(rows, None, None, None, torch.float32, CPU)))
    expected = hidden @ base.t()
    assert torch.equal(lazy.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(functional.cross_entropy(lazy, FLAT[3:6]), functional.cross_entropy(expected, FLAT[3:6]))
    torch.testing.assert_close(lazy + 0, expected)


class Exponential(torch.autograd.Function):
    """A function with a backward of its own, which bypasses __torch_function__."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.exp()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].exp()


def test_a_custom_autograd_function_gets_real_logits_and_passes_gradients(pair):
    gradients = torch.autograd.grad(Exponential.apply(pair.lazy).sum(), pair.inputs)
    for one, other in zip(gradients, torch.autograd.grad(pair.real.exp().sum(), pair.inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "use", [lambda z: z.sum(), lambda z: functional.cross_entropy(z.view(-1, V), FLAT), lambda z: z.argmax(-1)]
)
def test_logits_of_another_moment_are_refused(pair, use):
    with torch.no_grad():
        pair.rows.add_(1)
    with pytest.raises(SurgeryError, match="the trained weights have changed since the forward pass"):
        use(pair.lazy)


def test_a_loss_whose_rows_change_before_backward_is_refused(pair):
    loss = functional.cross_entropy(pair.lazy.view(-1, V), FLAT)
    with torch.no_grad():
        pair.rows.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_refused(pair):
    loss = functional.cross_entropy(pair.lazy.view(-1, V), FLAT)
    with pytest.raises(SurgeryError, match=r"second derivatives .* are not computed"):
        torch.autograd.grad(loss, pair.hidden, create_graph=True)


def test_a_target_out_of_range_is_refused_as_torch_does(pair):
    for logits in (pair.lazy, pair.real):
        with pytest.raises(IndexError, match=rf"Target {V} is out of bounds"):
            functional.cross_entropy(logits[0], torch.tensor([1, 2, V, 3]))


def test_no_target_at_all_gives_what_torch_gives(pair):
    ignored = torch.full_like(FLAT, -100)
    for reduction in ("sum", "none", "mean"):
        found, expected = (
            functional.cross_entropy(z.view(-1, V), ignored, reduction=reduction) for z in (pair.lazy, pair.real)
        )
        torch.testing.assert_close(found, expected, equal_nan=True)
    loss = functional.cross_entropy(pair.lazy.view(-1, V), ignored, reduction="sum")
    for gradient in torch.autograd.grad(loss, pair.inputs):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_full_model(dtype):
    """The reference is float64; a block is computed in float32 from the same half-precision numbers."""
    pair, exact = Pair(True, True, dtype=dtype), Pair(True, True, dtype=dtype)
    reference = functional.linear(
        exact.hidden.double(),
        exact.lazy.source.matrix.read_rows(torch.arange(V)).double(),
        exact.bias.double(),
    )
    losses = [functional.cross_entropy(z.float().view(-1, V), FLAT).double() for z in (pair.lazy, pair.real)]
    errors = [(loss - functional.cross_entropy(reference.view(-1, V), FLAT)).abs().item() for loss in losses]
    assert errors[0] <= errors[1] + 1e-6
    gradients = [torch.autograd.grad(loss, pair.inputs, retain_graph=True) for loss in losses]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=2e-3)
