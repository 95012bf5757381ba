"""Counting unseen tokens in training: at once on the CPU, on an accelerator without a synchronisation a step."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from pema_adapters.errors import UnseenTokenError

logger = logging.getLogger(__name__)


class UnseenCount:
    """How many of the tokens that training met have no row. Warns once, at the first step with such a token."""

    def __init__(self) -> None:
        self._tokens = 0
        self.has_warned = False

    def add(self, tokens: int, unseen: int) -> None:
        """Count the tokens of one forward."""
        self._tokens += tokens
        if unseen:
            self.has_warned = True
            logger.warning(
                "%d of the first %d tokens in training (%.1f%%) are outside the partial vocabulary: they get the "
                "base's rows, which do not train: give shrink_embeddings all of the training data (every split and "
                'column), or use PEMAConfig(vocabulary="grow")', unseen, self._tokens, 100 * unseen / self._tokens,
            )  # fmt: skip


class UnseenWatch:
    """Looks at each step for a token without a row, and reads the answer once it has arrived by itself.

    The device keeps the largest unseen id so far (-1: none); a copy travels to pinned memory behind the step's own
    work, and `look` raises `UnseenTokenError` at the first later step that finds it there. `settle` waits: it is
    called where state is saved, so that nothing trained on a wrong row is written.
    """

    def __init__(self) -> None:
        self._worst: Tensor | None = None
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: object) -> UnseenWatch:
        return UnseenWatch()

    def __reduce__(self) -> tuple[type[UnseenWatch], tuple[()]]:
        return UnseenWatch, ()

    def look(self, input_ids: Tensor, positions: Tensor) -> None:
        """Note whether a position [...] is -1, and read an earlier answer if it is there. Raises: UnseenTokenError."""
        unseen = torch.where(positions < 0, input_ids, -1).max()
        self._worst = unseen if self._worst is None else torch.maximum(self._worst, unseen)
        if self._arrived is not None and not self._arrived.query():  # type: ignore[no-untyped-call]
            return
        if self._copy is not None:
            self._judge(int(self._copy))
        self._copy = torch.empty((), dtype=self._worst.dtype, pin_memory=True)
        self._copy.copy_(self._worst, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    def settle(self) -> None:
        """Wait for the answer to every step so far. Raises: UnseenTokenError."""
        if self._worst is not None:
            self._judge(int(self._worst))

    def _judge(self, token_id: int) -> None:
        if token_id < 0:
            return
        self._worst = self._copy = self._arrived = None
        raise UnseenTokenError(
            f"a training batch held token id {token_id}, which is outside the partial vocabulary, so a step has "
            "trained a wrong row: scan all training data (every split and column) before shrink_embeddings, and "
            "start again from the last checkpoint"
        )
