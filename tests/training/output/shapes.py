"""The shapes of all tensors that an operation computes, in forward and in backward passes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pema_adapters.training.output.head_weight import HeadWeight
from pema_adapters.training.output.lazy_logits import LazyLogits


class RecordShapes(TorchDispatchMode):
    """Record the shape of every result inside the block, but for those of lazy tensors."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
        self.shapes |= {tuple(each.shape) for each in tensors if not isinstance(each, LazyLogits | HeadWeight)}
        return found

    def find_with(self, size):
        """Return the shapes of two dimensions or more, one of them `size`."""
        return [
            shape for shape in self.shapes if len(shape) > 1 and max(shape) > 1 and size in shape and shape != (1, size)
        ]
