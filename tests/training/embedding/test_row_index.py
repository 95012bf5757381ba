"""`RowIndex` on cases that can be checked by eye, and `replace_data` while graphs of the old shape are alive."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pema_adapters.training.embedding.row_index import RowIndex, replace_data


class Dtypes(TorchDispatchMode):
    """Records the dtype of every tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found.add(getattr(result, "dtype", None))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_new_graph_works_while_one_of_the_old_shape_is_alive(dtype):
    parameter = nn.Parameter(torch.ones(2, 3, dtype=dtype))
    older = (2 * parameter).sum()  # holds the node that adds up the gradient of [2, 3]
    replace_data(parameter, torch.ones(4, 3, dtype=dtype))
    (3 * parameter).sum().backward()
    assert parameter.grad.shape == (4, 3) and bool((parameter.grad == 3).all())
    assert older.grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_no_float64_tensor_is_created(dtype):
    """Apple's GPUs do not support float64."""
    data = torch.ones(4, 3, dtype=dtype)
    parameter = nn.Parameter(torch.ones(2, 3, dtype=dtype), requires_grad=dtype.is_floating_point)
    with Dtypes() as seen:
        replace_data(parameter, data)
    assert torch.float64 not in seen.found and parameter.dtype == dtype


def test_row_index_operations():
    small = RowIndex(torch.tensor([3, 5, 9], dtype=torch.int32))
    large = small.with_tokens(torch.tensor([4, 9])).with_tokens(torch.tensor([1]))
    assert large.token_ids.tolist() == [1, 3, 4, 5, 9] and large.size_when_added.tolist() == [5, 3, 4, 3, 3]
    assert large.positions_in(small).tolist() == [-1, 0, -1, 1, 2]
    assert large.remap(torch.tensor([7.0, 8, 9]), small, fill=0.5).tolist() == [0.5, 7, 0.5, 8, 9]
    assert [large.ancestor(k) and large.ancestor(k).token_ids.tolist() for k in (2, 3, 4)] == [
        None,
        [3, 5, 9],
        [3, 4, 5, 9],
    ]
    assert small.is_subset_of(large) and not large.is_subset_of(small)
