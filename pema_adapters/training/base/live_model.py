"""The base model's tensors as they are in memory, in the form that fingerprints are taken from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pema_adapters.training import upstream
from pema_adapters.training.base.base_model import to_float32


class LiveModel:
    """A `formats.fingerprint.TensorSource` over the tensors in memory, without those that adapters added.

    Args:
        model: the model.
        embedding: name of the embedding matrix within the base model.
        absent: shape of the matrix, while `load_model` leaves it out.

    Attributes:
        name: the Hub id or folder that the model was loaded from, "" where that cannot be printed.
        prefix: of tensor names of the base model within the model.
    """

    def __init__(self, model: Any, embedding: str, absent: tuple[int, int] = (0, 0)) -> None:
        self.prefix = str(model.base_model_prefix or "")
        self.embedding = embedding
        name = str(model.name_or_path or "")
        self.name = name if name.isprintable() else ""
        added = upstream.find_adapter_tensors(model)
        state = _state_without_quantization(model.base_model)
        state.setdefault(embedding, torch.empty(absent, device="meta"))
        pointer = state[embedding].data_ptr() or None
        self._tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in state.items()
            if name not in added and (name == embedding or tensor.data_ptr() != pointer)
        }

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes by name within the base model."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return rows [n, d] as float32."""
        return to_float32(self._tensors[name][torch.from_numpy(ids).long().to(self._tensors[name].device)])

    def values(self, name: str, positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the values [n] at flat positions [n] as float32."""
        flat = self._tensors[name].reshape(-1)
        return to_float32(flat[torch.from_numpy(positions).to(flat.device)])

    def has_values(self, name: str, positions: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> bool:
        """Return whether a tensor equals float32 `values` [n] of a checkpoint, cast to its dtype, at `positions`."""
        loaded = torch.from_numpy(values).to(self._tensors[name].dtype)
        return np.array_equal(self.values(name, positions), to_float32(loaded), equal_nan=True)

    def get_tensor(self, name: str) -> Tensor:
        """Return the tensor in memory."""
        return self._tensors[name]

    def find_newly_initialized(self, stored: Collection[str]) -> list[str]:
        """Find the tensors that a checkpoint lacks.

        A tensor that is tied to a stored one counts as stored, and so does one on the meta device: it will be tied.

        Args:
            stored: names of the checkpoint's tensors within the base model.
        """
        pointers = {tensor.data_ptr() for name, tensor in self._tensors.items() if name in stored}
        missing = {name: tensor for name, tensor in self._tensors.items() if name not in stored and not tensor.is_meta}
        return [name for name, tensor in missing.items() if tensor.data_ptr() not in pointers or not tensor.numel()]


def _state_without_quantization(model: nn.Module) -> dict[str, Tensor]:
    """Return the state without what quantised layers save beside their weights (scales, formats)."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    known = {name for name, _ in tensors}
    return {name: tensor for name, tensor in model.state_dict().items() if name in known}
