"""K rows of a matrix [V, d], and which ones: the partial embedding E' itself (the paper's section 4)."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

from pema_adapters.errors import SurgeryError, TokenRangeError
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.training.base.base_model import with_row_digest
from pema_adapters.training.embedding import optimizer_state
from pema_adapters.training.embedding.dynamic_rows import GrowableWeight
from pema_adapters.training.embedding.row_index import RowIndex, replace_data

ID_DTYPES = (torch.int32, torch.int64)


class RowSource(Protocol):
    """Provides base rows."""

    def read_rows(self, token_ids: Annotated[Tensor, "Int n"]) -> Annotated[Tensor, "Float n d"]:
        """Return the rows [n, d] of `token_ids` [n], both on the CPU."""


class RowTable(nn.Module):
    """K rows of a matrix [V, d]: the base class of `PartialRows` and `PartialEmbedding`.

    Attributes:
        weight: the rows [K, d].
        token_ids: int32 [K], strictly increasing; None where there are no rows.
        fingerprint: uint8 [n], the description of the base that `formats.fingerprint` reads.
        vocab_size: V.
        tied_to_output: whether a language-model head that shares the matrix uses these rows as well.
        growth_source: the base of a table that gets a row for every token it meets in training; None: it is static.
        growing_thread: see `dynamic_rows.GrowableTable`.
        was_loaded: whether the rows come from a file and have not been compared with the model's base yet.
    """

    weight: Tensor
    token_ids: Tensor | None
    fingerprint: Tensor | None
    vocab_size: int
    loads_piecewise = False
    was_loaded = False
    tied_to_output = True
    growth_source: RowSource | None = None
    growing_thread: int | None = None
    _row_index: RowIndex | None = None
    _fingerprint_is_stale = False
    _inverse_index: Tensor | None
    _located: tuple[int, int | None] | None

    @property
    def row_index(self) -> RowIndex:
        """The tokens of the rows, on the CPU; the first access after loading may synchronise."""
        if self._row_index is None:
            ids = torch.empty(0, dtype=torch.int32) if self.token_ids is None else self.token_ids
            self._row_index = RowIndex(ids.cpu().clone())
        return self._row_index

    def set_rows(
        self,
        token_ids: Annotated[Tensor, "Int K"],
        rows: Annotated[Tensor, "Float K d"],
        fingerprint: Annotated[Tensor, "UInt8 n"],
    ) -> None:
        """Replace all rows.

        The Parameter keeps its identity; its gradient, and the state that optimizers have for it, move with the rows.

        Args:
            token_ids: [K], strictly increasing.
            rows: [K, d], in that order.
            fingerprint: uint8 [n], of the base.
        """
        new = RowIndex(token_ids.cpu().to(torch.int32))
        if self.row_index.is_subset_of(new):
            new = self.row_index.with_tokens(new.token_ids)
        self._replace_rows(new, rows)
        self.fingerprint, self._fingerprint_is_stale = fingerprint.to(self.weight.device), False

    def add_rows(self, token_ids: Annotated[Tensor, "Int n"], rows: Annotated[Tensor, "Float n d"]) -> None:
        """Add rows to those of a growing table; otherwise like `set_rows`.

        The fingerprint is renewed when the table is saved.

        Args:
            token_ids: [n], strictly increasing, without a row so far.
            rows: [n, d].
        """
        old, new = self.row_index, self.row_index.with_tokens(token_ids)
        merged = new.remap(self.weight.detach(), old)
        positions = torch.searchsorted(new.token_ids, token_ids.cpu().to(torch.int32))
        merged[positions.to(merged.device)] = rows.to(merged.device, merged.dtype)
        self._replace_rows(new, merged)
        self._fingerprint_is_stale = True

    def add_gradient(self, gradient: Annotated[Tensor, "Float K d"]) -> None:
        """Add to the weight's gradient what autograd cannot add: its graph was made for other rows."""
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad.add_(gradient)

    def get_growable_weight(self) -> Annotated[Tensor, "Float K d"]:
        """Return the weight for use in a graph; that of a growing table stays valid in it when K changes."""
        if self.growth_source is None or not self.weight.requires_grad or not torch.is_grad_enabled():
            return self.weight
        optimizer_state.track(self)  # here too, because a copy of a table is not tracked yet
        return GrowableWeight.apply(self.weight, self)  # type: ignore[no-any-return, no-untyped-call]

    def _replace_rows(self, new: RowIndex, rows: Tensor) -> None:
        device, gradient, old = self.weight.device, self.weight.grad, self.row_index
        replace_data(self.weight, rows.to(device, self.weight.dtype))
        if gradient is not None:
            self.weight.grad = new.remap(gradient, old)
        # a copy, because loading a state writes into the buffer
        self._row_index, self.token_ids = new, new.token_ids.to(device, copy=True)
        self._invalidate_index()
        optimizer_state.track(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._fingerprint_is_stale:
            self._renew_fingerprint()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _renew_fingerprint(self) -> None:
        """Digest the base rows of all K tokens; when saving rather than per added row, since it reads them all."""
        assert self.fingerprint is not None and self.token_ids is not None and self.growth_source is not None
        old = Fingerprint.from_array(self.fingerprint.cpu().numpy())
        new = with_row_digest(old, self.token_ids, self.growth_source.read_rows)
        self.fingerprint, self._fingerprint_is_stale = new.to(self.weight.device), False

    def locate(self, input_ids: Annotated[Tensor, "Int *batch"]) -> Annotated[Tensor, "Int32 *batch"]:
        """Return the row of each token, int32, in the shape of `input_ids`; -1 where a token has none.

        Raises:
            TokenRangeError: an id is negative, or V or above.
            SurgeryError: loaded token ids are damaged.
        """
        index = self._get_inverse_index()
        check_range(input_ids, self.vocab_size)
        return index.index_select(0, input_ids.reshape(-1)).view(input_ids.shape)

    def locate_token(self, token_id: int | None) -> int | None:
        """Return the row of one token, None if it has none. Cached: finding it may synchronise."""
        if token_id is None or self.token_ids is None:
            return None
        if self._located is None or self._located[0] != token_id:
            found = (self.token_ids == token_id).nonzero().flatten().tolist()
            self._located = (token_id, found[0] if found else None)
        return self._located[1]

    def _invalidate_index(self) -> None:
        self._inverse_index = self._located = None

    def _get_inverse_index(self) -> Tensor:
        """Return the row of every token, int32 [V]: the inverse of `token_ids`.

        Derived, so never saved, and rebuilt when the module has moved to another device.
        """
        if self._inverse_index is None or self._inverse_index.device != self.weight.device:
            assert self.token_ids is not None
            problem = _find_problem(self.token_ids, self.weight, self.vocab_size)
            if problem:
                raise SurgeryError(f"the loaded embedding rows are damaged: {problem}")
            ids = self.token_ids.to(self.weight.device)
            index = torch.full((self.vocab_size,), -1, dtype=torch.int32, device=ids.device)
            index[ids.long()] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
            self._inverse_index = index
        return self._inverse_index

    def _load_from_state_dict(  # noqa: PLR0913, PLR0917 - torch's signature
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take the number of rows of the state if it has token ids; optimizer state survives.

        Raises: SurgeryError where ids and rows of the state do not fit together; the table is unchanged then.
        """
        self._resize_to(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._invalidate_index()
        self._row_index, self.was_loaded = None, True
        self._fingerprint_is_stale &= prefix + "fingerprint" not in state_dict

    def _resize_to(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Change the number of rows to that of the state."""
        if self.token_ids is None:
            return
        token_ids, rows = state_dict.get(prefix + "token_ids"), state_dict.get(prefix + "weight")
        problem = self._find_problem_in_state(token_ids, rows, is_complete=bool(prefix))
        if problem:
            raise SurgeryError(
                f"cannot load embedding rows: {prefix}token_ids: {problem}; the artifact is damaged or of another "
                "model: save it again, or load it into the model that it was trained on"
            )
        if not self.loads_piecewise and (token_ids is None or rows is None):
            return
        for name in ("weight", "token_ids", "fingerprint"):
            new, current = state_dict.get(prefix + name), getattr(self, name)
            if new is not None and current is not None and new.shape[0] != current.shape[0]:
                replace_data(current, current.data.new_empty((new.shape[0], *current.shape[1:])))

    def _find_problem_in_state(self, token_ids: Tensor | None, rows: Tensor | None, is_complete: bool) -> str | None:
        """Describe what is wrong with a table's state; a single tensor may be missing unless it `is_complete`."""
        if token_ids is not None and rows is not None:
            return _find_problem(token_ids, rows, self.vocab_size)
        if token_ids is not None and token_ids.dtype not in ID_DTYPES:
            return _describe_dtype(token_ids)
        if not is_complete or not self.loads_piecewise:
            return None
        ids = self.token_ids if token_ids is None else token_ids
        count = self.weight.shape[0] if rows is None else rows.shape[0]
        return None if ids is None or len(ids) == count else f"{len(ids)} ids for {count} rows, expected as many"


def refuse_data_parallel(module: nn.Module) -> None:
    """Refuse to compute in a replica of `nn.DataParallel`, which refers to the rows on the original's device.

    Raises:
        SurgeryError: the module is such a replica.
    """
    if "_is_replica" in module.__dict__:
        raise SurgeryError(
            "nn.DataParallel cannot replicate a partial embedding: start one process for each GPU (torchrun "
            "--nproc_per_node=gpu SCRIPT.py), or show one to this process (CUDA_VISIBLE_DEVICES=0)"
        )


def check_range(input_ids: Annotated[Tensor, "Int *batch"], vocab_size: int) -> None:
    """Refuse ids outside [0, V), on the CPU; other devices check them as they do for `nn.Embedding`.

    Raises:
        TokenRangeError: an id is negative, or V or above.
    """
    if input_ids.device.type != "cpu" or not input_ids.numel():
        return
    values = input_ids.detach().numpy()
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise TokenRangeError(
            f"input_ids hold token id {wrong}, but the embedding has rows 0 to {vocab_size - 1}: "
            "is the tokenizer that of this model, and were new tokens followed by resize_token_embeddings?"
        )


def _find_problem(token_ids: Tensor, rows: Tensor, vocab_size: int) -> str | None:
    """Describe why `token_ids` cannot be those of `rows`, None if they can."""
    if token_ids.dtype not in ID_DTYPES:
        return _describe_dtype(token_ids)
    if token_ids.ndim != 1 or token_ids.shape[0] != rows.shape[0]:
        return f"{tuple(token_ids.shape)} ids do not match {tuple(rows.shape)} rows"
    if token_ids.device.type == "meta" or not len(token_ids):
        return None
    if bool((token_ids[1:] <= token_ids[:-1]).any()):
        return "ids are not strictly increasing"
    if int(token_ids[0]) < 0 or int(token_ids[-1]) >= vocab_size:
        return f"ids {int(token_ids[0])} to {int(token_ids[-1])} do not fit the model's {vocab_size} embedding rows"
    return None


def _describe_dtype(token_ids: Tensor) -> str:
    return f"ids of dtype {str(token_ids.dtype).removeprefix('torch.')}, expected int32"
