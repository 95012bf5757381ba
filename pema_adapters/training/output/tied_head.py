"""The output embedding of a language model that is tied to its input: both share the matrix E [V, d].

Transformers ties them as one Parameter in two modules. When the input keeps K rows, the output still needs all V, since
a softmax is over the whole vocabulary. So the head reads the base's E, block by block, from wherever it is

    disk      in the checkpoint's file: no memory
    host      in host memory
    device    on the device of the model

and what it trains is

    tied    the K trained rows, in the places of the base's: what was tied stays tied
    full    nothing; the output keeps the base's matrix: input and output are two matrices from now on

The head becomes a `PartialOutput` in place, by a change of its class, as the embedding does. It returns `LazyLogits`.
The base's E is not a buffer of it, because DistributedDataParallel broadcasts buffers at every forward.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pema_adapters.errors import SurgeryError
from pema_adapters.training.base.base_model import BaseModel
from pema_adapters.training.embedding.partial_embedding import PartialEmbedding
from pema_adapters.training.embedding.row_table import RowTable, refuse_data_parallel
from pema_adapters.training.output.head_matrix import BaseMatrix, HeadMatrix
from pema_adapters.training.output.head_weight import make_weight
from pema_adapters.training.output.lazy_logits import make_lazy
from pema_adapters.training.output.logit_source import Source
from pema_adapters.training.output.transforms import AddBias, read_version

STORAGES = ("auto", "disk", "host", "device")


class PartialOutput(nn.Linear):
    """An `nn.Linear` [V, d] that shares the input embedding's weight. Made by `convert_heads`, never constructed.

    While the embedding is shrunk, the head has no weight: neither a Parameter nor a buffer, and none in a state dict.

    Attributes:
        storage: where the base's matrix is then: "auto", "disk", "host" or "device".
    """

    storage: str
    _embedding: tuple[PartialEmbedding, ...]
    _held: Tensor | None

    @property
    def embedding(self) -> PartialEmbedding:
        """The embedding whose matrix the head shares; held in a tuple, because it is no submodule."""
        return self._embedding[0]

    @property
    def is_shrunk(self) -> bool:
        """Whether the base's matrix is read in blocks, rather than being the head's Parameter."""
        return "weight" not in self._parameters

    def __getattr__(self, name: str) -> Any:
        """Return a `HeadWeight` as `weight`, for code that reads it, unless the head's Parameter is all there is."""
        if name == "weight" and "_embedding" in self.__dict__ and self._is_composed():
            return make_weight(self._make_matrix(self.embedding.weight.device))
        return super().__getattr__(name)

    def _is_composed(self) -> bool:
        """Whether the matrix is more than the head's Parameter."""
        if self.is_shrunk:
            return self.embedding.is_shrunk
        return next(self.embedding.iterate_tied_rows(), None) is not None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., d]: lazy ones while the embedding is shrunk."""
        refuse_data_parallel(self)
        if not self._is_composed():
            return super().forward(input)
        if not self.is_shrunk and self._parameters["weight"].requires_grad:  # type: ignore[union-attr]
            return self._compute_with_weight(input)
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            input = input.to(torch.get_autocast_dtype(device_type))
        parts = () if self.bias is None else (AddBias.of(self.bias),)
        return make_lazy(Source(input, self._make_matrix(input.device), parts))

    def _compute_with_weight(self, input: Tensor) -> Tensor:
        """Return real logits of a head whose matrix trains as a whole, beside rows of an adapter."""
        logits = functional.linear(input, self._parameters["weight"], self.bias)  # type: ignore[arg-type]
        for rows in self.embedding.iterate_tied_rows():
            assert rows.token_ids is not None
            ids = rows.token_ids.long()
            bias = None if self.bias is None else self.bias[ids]
            trained = functional.linear(input, rows.weight.to(input.dtype), bias)
            logits = logits.index_copy(-1, ids, trained.to(logits.dtype))
        return logits

    def set_storage(self, storage: str) -> None:
        """Change where the base's matrix is held.

        Raises:
            SurgeryError: an unknown storage.
        """
        if storage not in STORAGES:
            raise SurgeryError(f"output_storage is {storage!r}, expected one of {', '.join(map(repr, STORAGES))}")
        if storage != self.storage:
            self.storage, self._held = storage, None

    def release(self) -> None:
        """Drop the weight, because the embedding releases it; it is kept where the storage is in memory."""
        matrix = self._parameters.pop("weight", None)
        if matrix is not None and self.storage in ("host", "device"):
            self._held = matrix.detach() if self.storage == "device" else matrix.detach().cpu()

    def tie(self) -> None:
        """Share the embedding's weight again, which is the full matrix."""
        self._held = None
        self._parameters["weight"] = self.embedding._parameters["weight"]

    def untie(self, matrix: Tensor) -> None:
        """Make `matrix` [V, d], the base's, a Parameter of the head."""
        self._held = None
        self._parameters["weight"] = nn.Parameter(matrix)

    def _make_matrix(self, device: torch.device) -> HeadMatrix:
        rows, ids = _combine(list(self.embedding.iterate_tied_rows()), self.embedding.weight.dtype)
        base, dtype = self._find_base(device), self.embedding.weight.dtype
        on_device = None if ids is None else ids.to(device)
        version = 0 if rows is None else read_version(rows)
        return HeadMatrix(base, rows, on_device, ids, dtype, device, version)

    def _find_base(self, device: torch.device) -> BaseMatrix:
        base = self.embedding.owner.base
        if not self.is_shrunk or not isinstance(base, BaseModel):
            weight = self._parameters["weight"]
            assert weight is not None
            return weight
        storage = choose_storage(self.storage, base, self.embedding.weight.dtype, device)
        if storage == "disk":
            return base.matrix
        place = device if storage == "device" else torch.device("cpu")
        if self._held is None:
            self._held = _read_matrix(base, self.embedding.weight.dtype, place, pins=device.type == "cuda")
        elif self._held.device != place:
            self._held = self._held.to(place)
        return self._held


def choose_storage(storage: str, base: BaseModel, dtype: torch.dtype, device: torch.device) -> str:
    """Decide where the matrix of a head is held.

    Args:
        storage: as in `PEMAConfig.output_storage`.
        base: of the model.
        dtype: of the model.
        device: of the model.

    Returns:
        "disk", "host" or "device". "auto" means disk for a CPU, whose page cache is the memory; the device where the
        matrix takes at most half of its free memory; else the host.
    """
    if storage != "auto":
        return storage
    if device.type != "cuda":
        return "disk"
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if 2 * len(base.matrix) * base.matrix.dim * dtype.itemsize <= free else "host"


def _read_matrix(base: BaseModel, dtype: torch.dtype, device: torch.device, pins: bool) -> Tensor:
    """Load the base's matrix [V, d]; pinned in host memory if `pins`, for faster copies to a GPU."""
    pins = pins and device.type == "cpu"
    matrix = torch.empty(base.matrix.shape, dtype=dtype, device=device, pin_memory=pins)
    first = 0
    for block in base.matrix.iterate_blocks():
        matrix[first : first + len(block)] = block.to(dtype)
        first += len(block)
    return matrix


def _combine(tables: list[RowTable], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows [K, d] of tables in `dtype`, in the graph, and their ids int64 [K] on the CPU.

    Of several rows for a token, the last table's counts.
    """
    if not tables:
        return None, None
    rows, ids = tables[0].weight, tables[0].row_index.token_ids.long()
    for table in tables[1:]:
        later = table.row_index.token_ids.long()
        kept = (~torch.isin(ids, later)).nonzero().squeeze(-1)
        ids, order = torch.cat([ids[kept], later]).sort()
        rows = torch.cat([rows[kept.to(rows.device)], table.weight.to(rows.dtype)])[order.to(rows.device)]
    return rows.to(dtype), ids


def convert_heads(model: nn.Module, embedding: PartialEmbedding) -> dict[str, PartialOutput]:
    """Convert every head of `model` that shares the matrix of `embedding`.

    Returns:
        The heads by name.

    Raises:
        SurgeryError: a module other than a linear layer shares the matrix.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or not _shares_matrix(module, embedding):
            continue
        if not _is_convertible(module):
            raise SurgeryError(
                f"{name!r} ({type(module).__name__}) shares the matrix of the input embedding, and needs all "
                f"{embedding.num_embeddings} rows; expected torch.nn.Linear, so PEMA does not apply to "
                f"{type(model).__name__}"
            )
        found[name] = _convert(module, embedding)
    return found


def can_convert_heads(model: nn.Module, embedding: nn.Embedding) -> bool:
    """Return whether every module that shares the matrix is an embedding or a head that `convert_heads` converts."""
    sharing = [module for module in model.modules() if _shares_matrix(module, embedding)]
    return all(isinstance(module, nn.Embedding) or _is_convertible(module) for module in sharing)


def has_tied_head(model: nn.Module, embedding: nn.Embedding) -> bool:
    """Return whether a module other than an embedding shares the matrix."""
    return any(not isinstance(module, nn.Embedding) and _shares_matrix(module, embedding) for module in model.modules())


def find_heads(model: nn.Module, embedding: PartialEmbedding) -> dict[str, PartialOutput]:
    """Return the heads that `convert_heads` converted, by name."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: each for name, each in modules if isinstance(each, PartialOutput) and each.embedding is embedding}


def revert_heads(model: nn.Module, embedding: PartialEmbedding) -> None:
    """Undo `convert_heads`."""
    for head in find_heads(model, embedding).values():
        del head.__dict__["_embedding"], head.__dict__["_held"], head.__dict__["storage"]
        head.__class__ = next(c for c in type(head).__mro__ if not issubclass(c, PartialOutput))  # type: ignore[assignment]


def _shares_matrix(module: nn.Module, embedding: nn.Embedding) -> bool:
    if isinstance(module, PartialOutput):
        return module.embedding is embedding
    return any(parameter is embedding.weight for parameter in module._parameters.values())


def _is_convertible(module: nn.Module) -> bool:
    return isinstance(module, PartialOutput) or type(module).forward is nn.Linear.forward


def _convert(head: nn.Linear, embedding: PartialEmbedding) -> PartialOutput:
    if not isinstance(head, PartialOutput):
        head.__class__ = _get_output_class(type(head))  # type: ignore[arg-type]
        converted: Any = head
        converted._embedding, converted._held, converted.storage = (embedding,), None, "auto"
    return head  # type: ignore[return-value]


@cache
def _get_output_class(original: type[nn.Linear]) -> type[PartialOutput]:
    return (
        PartialOutput if original is nn.Linear else type(f"Partial{original.__name__}", (PartialOutput, original), {})
    )
