"""K rows of a matrix [V, d], and which ones: the partial embedding E' itself (the paper's section 4). Torch only."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pema_adapters.errors import SurgeryError, TokenRangeError
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.training.base.find_base import refit
from pema_adapters.training.embedding import optimizer_state
from pema_adapters.training.embedding.dynamic_rows import LiveRows
from pema_adapters.training.embedding.row_index import Layout, replace_data

ID_DTYPES = (torch.int32, torch.int64)


class RowSource(Protocol):
    """Where base rows come from."""

    def rows(self, token_ids: Tensor) -> Tensor:
        """Rows [n, d] of `token_ids` [n], both on the CPU."""


class RowTable(nn.Module):
    """K rows of a matrix [V, d]: what `PartialRows` and a `PartialEmbedding` with own rows share.

    Attributes: `weight` [K, d]; `token_ids` int32 [K], strictly increasing; `fingerprint` uint8 [n], the description of
    the base that `formats.fingerprint` reads; `vocab_size` V; `ties_output`: whether a language-model head that shares
    the matrix uses these rows, too; `grows_over`: the base of a table that gets a row for every token that training
    meets, None for one that stays as it is; `grown_by`: see `growing.note_thread`.
    """

    weight: Tensor
    token_ids: Tensor | None
    fingerprint: Tensor | None
    vocab_size: int
    loads_piecewise = False
    was_loaded = False  # from a file, and not yet compared with the model's base
    ties_output = True
    grows_over: RowSource | None = None
    grown_by: int | None = None
    _layout: Layout | None = None
    _fingerprint_is_old = False
    _index: Tensor | None
    _padding: tuple[int, int | None] | None

    @property
    def layout(self) -> Layout:
        """Which token each row belongs to, on the CPU: the first look at loaded rows may cost a synchronisation."""
        if self._layout is None:
            ids = torch.empty(0, dtype=torch.int32) if self.token_ids is None else self.token_ids
            self._layout = Layout(ids.cpu().clone())
        return self._layout

    def set_rows(self, token_ids: Tensor, rows: Tensor, fingerprint: Tensor) -> None:
        """Hold `rows` [K, d] for `token_ids` [K], strictly increasing.

        The Parameter keeps its identity; its gradient and the state that optimizers have for it follow the rows.
        """
        new = Layout(token_ids.cpu().to(torch.int32))
        if self.layout.lies_within(new):
            new = self.layout.with_tokens(new.token_ids)
        self._lay_out(new, rows)
        self.fingerprint, self._fingerprint_is_old = fingerprint.to(self.weight.device), False

    def add_rows(self, token_ids: Tensor, rows: Tensor) -> None:
        """Hold `rows` [n, d] for `token_ids` [n], which have none yet, as well; otherwise as `set_rows`.

        The table grows, so it renews its fingerprint by itself, when it is saved.
        """
        old, new = self.layout, self.layout.with_tokens(token_ids)
        together = new.carry(self.weight.detach(), old)
        places = torch.searchsorted(new.token_ids, token_ids.cpu().to(torch.int32))
        together[places.to(together.device)] = rows.to(together.device, together.dtype)
        self._lay_out(new, together)
        self._fingerprint_is_old = True

    def add_gradient(self, gradient: Tensor) -> None:
        """Add to the gradient of the weight what autograd cannot: its graph was made for other rows."""
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad.add_(gradient)

    def live_weight(self) -> Tensor:
        """The weight [K, d] for a graph; of a table that grows, for one that outlives a change of K."""
        if self.grows_over is None or not self.weight.requires_grad or not torch.is_grad_enabled():
            return self.weight
        optimizer_state.follow(self)  # a copy of a table is known from here on
        return LiveRows.apply(self.weight, self)  # type: ignore[no-any-return, no-untyped-call]

    def _lay_out(self, new: Layout, rows: Tensor) -> None:
        device, gradient, old = self.weight.device, self.weight.grad, self.layout
        replace_data(self.weight, rows.to(device, self.weight.dtype))
        if gradient is not None:
            self.weight.grad = new.carry(gradient, old)
        # a copy, for loading a state writes into the buffer
        self._layout, self.token_ids = new, new.token_ids.to(device, copy=True)
        self._forget_index()
        optimizer_state.follow(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._fingerprint_is_old:
            self._renew_fingerprint()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _renew_fingerprint(self) -> None:
        """Describe the base rows of all K tokens; here rather than at each row that comes, for it reads them all."""
        assert self.fingerprint is not None and self.token_ids is not None and self.grows_over is not None
        old = Fingerprint.from_array(self.fingerprint.cpu().numpy())
        self.fingerprint = refit(old, self.token_ids, self.grows_over.rows).to(self.weight.device)
        self._fingerprint_is_old = False

    def positions(self, input_ids: Tensor) -> Tensor:
        """Compact positions, int32, shaped as `input_ids`; -1 where a token has no row here."""
        index = self._token_index()
        check_range(input_ids, self.vocab_size)
        return index.index_select(0, input_ids.reshape(-1)).view(input_ids.shape)

    def position_of(self, token_id: int | None) -> int | None:
        """The compact position of one token, None where it has none. Remembered: it may cost a synchronisation."""
        if token_id is None or self.token_ids is None:
            return None
        if self._padding is None or self._padding[0] != token_id:
            found = (self.token_ids == token_id).nonzero().flatten().tolist()
            self._padding = (token_id, found[0] if found else None)
        return self._padding[1]

    def _forget_index(self) -> None:
        self._index = self._padding = None

    def _token_index(self) -> Tensor:
        """The inverse of token_ids, int32 [V]: derived, so never saved and rebuilt wherever the module goes."""
        if self._index is None or self._index.device != self.weight.device:
            assert self.token_ids is not None
            problem = _invalid(self.token_ids, self.weight, self.vocab_size)
            if problem:
                raise SurgeryError(f"the loaded embedding rows are damaged: {problem}")
            ids = self.token_ids.to(self.weight.device)
            index = torch.full((self.vocab_size,), -1, dtype=torch.int32, device=ids.device)
            index[ids.long()] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
            self._index = index
        return self._index

    def _load_from_state_dict(  # noqa: PLR0913, PLR0917 - torch's signature
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Take another number of rows when the state brings its token ids along; optimizer state survives.

        Raises: SurgeryError where ids and rows of the state cannot belong together; the table is as it was.
        """
        self._make_room(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._forget_index()
        self._layout, self.was_loaded = None, True
        self._fingerprint_is_old &= prefix + "fingerprint" not in state_dict

    def _make_room(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Change the number of rows to that of the state."""
        if self.token_ids is None:
            return
        token_ids, rows = state_dict.get(prefix + "token_ids"), state_dict.get(prefix + "weight")
        problem = self._problem_of(token_ids, rows, is_whole=bool(prefix))
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

    def _problem_of(self, token_ids: Tensor | None, rows: Tensor | None, is_whole: bool) -> str | None:
        """What is wrong with the state of a table, if anything; one tensor at a time is right unless it `is_whole`."""
        if token_ids is not None and rows is not None:
            return _invalid(token_ids, rows, self.vocab_size)
        if token_ids is not None and token_ids.dtype not in ID_DTYPES:
            return _wrong_dtype(token_ids)
        if not is_whole or not self.loads_piecewise:
            return None
        ids = self.token_ids if token_ids is None else token_ids
        count = self.weight.shape[0] if rows is None else rows.shape[0]
        return None if ids is None or len(ids) == count else f"{len(ids)} ids for {count} rows, expected as many"


class PartialRows(RowTable):
    """The rows that one adapter trains, or holds; none until it has a vocabulary.

    Args: `vocab_size` V, `dim` d, the `device` of the matrix and the `dtype` of the rows; `unseen`, `trainable` and
    whether it is to grow as in `PEMAConfig`. Rows that do not train are the base's, and in no state.
    """

    token_ids: Tensor
    fingerprint: Tensor
    loads_piecewise = True  # from_pretrained hands over one tensor at a time

    def __init__(  # noqa: PLR0913, PLR0917 - what a table is, and what its config says
        self, vocab_size: int, dim: int, device: torch.device, dtype: torch.dtype, unseen: str, trainable: bool = True,
        grows: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.vocab_size = vocab_size
        self.unseen, self.trainable, self.grows = unseen, trainable, grows
        self.weight = nn.Parameter(torch.empty(0, dim, device=device, dtype=dtype))
        self.register_buffer("token_ids", torch.empty(0, device=device, dtype=torch.int32))
        self.register_buffer("fingerprint", torch.empty(0, device=device, dtype=torch.uint8))
        self._forget_index()

    def __len__(self) -> int:
        return len(self.token_ids)

    def __bool__(self) -> bool:
        return True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.trainable:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.trainable:
            super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """K of V, d."""
        return f"{len(self):,} of {self.vocab_size:,} rows, {self.weight.shape[1]}"


def refuse_data_parallel(module: nn.Module) -> None:
    """Raise SurgeryError in a replica of `nn.DataParallel`: its rows are those of the original, on another device."""
    if "_is_replica" in module.__dict__:
        raise SurgeryError(
            "nn.DataParallel cannot replicate a partial embedding: start one process for each GPU (torchrun "
            "--nproc_per_node=gpu SCRIPT.py), or show one to this process (CUDA_VISIBLE_DEVICES=0)"
        )


def check_range(input_ids: Tensor, vocab_size: int) -> None:
    """On the CPU refuse ids outside [0, V); elsewhere the device does, as it does for `nn.Embedding`."""
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


def _invalid(token_ids: Tensor, rows: Tensor, vocab_size: int) -> str | None:
    if token_ids.dtype not in ID_DTYPES:
        return _wrong_dtype(token_ids)
    if token_ids.ndim != 1 or token_ids.shape[0] != rows.shape[0]:
        return f"{tuple(token_ids.shape)} ids do not match {tuple(rows.shape)} rows"
    if token_ids.device.type == "meta" or not len(token_ids):
        return None
    if bool((token_ids[1:] <= token_ids[:-1]).any()):
        return "ids are not strictly increasing"
    if int(token_ids[0]) < 0 or int(token_ids[-1]) >= vocab_size:
        return f"ids {int(token_ids[0])} to {int(token_ids[-1])} do not fit the model's {vocab_size} embedding rows"
    return None


def _wrong_dtype(token_ids: Tensor) -> str:
    return f"ids of dtype {str(token_ids.dtype).removeprefix('torch.')}, expected int32"
