"""Unseen tokens in training: counted at once on the CPU, noticed without a synchronisation per step on a GPU."""

from __future__ import annotations

import logging
from typing import Annotated

import torch
from torch import Tensor

from pema_adapters.errors import UnseenTokenError

logger = logging.getLogger(__name__)


class UnseenCounter:
    """Counts tokens without a row in training, and warns once, at the first step with such a token."""

    def __init__(self) -> None:
        self._tokens = 0
        self.has_warned = False

    def add(self, tokens: int, unseen: int) -> None:
        """Add a forward over `tokens` tokens, of which `unseen` have no row."""
        self._tokens += tokens
        if unseen:
            self.has_warned = True
            logger.warning(
                "%d of the first %d tokens in training (%.1f%%) are outside the partial vocabulary: they get the "
                "base's rows, which do not train: give shrink_embeddings all of the training data (every split and "
                'column), or use PEMAConfig(vocabulary="grow")', unseen, self._tokens, 100 * unseen / self._tokens,
            )  # fmt: skip


class UnseenMonitor:
    """Raises for a token without a row at a later step, since asking the device at once would synchronise.

    The device keeps the largest unseen id so far (-1: none). A copy of it goes to pinned memory after the step's own
    work, and `record` reads it at the first step that finds it there. `sync` waits for it: called before state is
    saved, so that nothing trained on a wrong row is written.
    """

    def __init__(self) -> None:
        self._worst: Tensor | None = None
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: object) -> UnseenMonitor:
        return UnseenMonitor()

    def __reduce__(self) -> tuple[type[UnseenMonitor], tuple[()]]:
        return UnseenMonitor, ()

    def record(self, input_ids: Annotated[Tensor, "Int *batch"], positions: Annotated[Tensor, "Int *batch"]) -> None:
        """Record which tokens have no row, and check an earlier step if its answer has arrived.

        Args:
            input_ids: token ids [...].
            positions: their rows [...], -1 for none.

        Raises:
            UnseenTokenError: an earlier step met a token without a row.
        """
        if not input_ids.numel():
            return
        unseen = torch.where(positions < 0, input_ids, -1).max()
        self._worst = unseen if self._worst is None else torch.maximum(self._worst, unseen)
        if self._arrived is not None and not self._arrived.query():  # type: ignore[no-untyped-call]
            return
        if self._copy is not None:
            self._raise_if_unseen(int(self._copy))
        self._copy = torch.empty((), dtype=self._worst.dtype, pin_memory=True)
        self._copy.copy_(self._worst, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def sync(self) -> None:
        """Wait for the answer to every step so far.

        Raises:
            UnseenTokenError: one of them met a token without a row.
        """
        if self._worst is not None:
            self._raise_if_unseen(int(self._worst))

    def _raise_if_unseen(self, token_id: int) -> None:
        if token_id < 0:
            return
        self._worst = self._copy = self._arrived = None
        raise UnseenTokenError(
            f"a training batch held token id {token_id}, which is outside the partial vocabulary, so a step has "
            "trained a wrong row: scan all training data (every split and column) before shrink_embeddings, and "
            "start again from the last checkpoint"
        )
