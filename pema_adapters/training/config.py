"""How a user asks for PEMA: `PEMAConfig`, beside CompacterConfig and LoRAConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters.configuration.adapter_config import AdapterConfig


@dataclass(eq=False)
class PEMAConfig(AdapterConfig):  # type: ignore[misc]
    """Partial Embedding Matrix Adaptation (Williams and Aletras, section 4): train the embedding rows that the data
    use.

    Combine it with another method in a `ConfigUnion(PEMAConfig(), CompacterConfig())`. An adapter with PEMA needs a
    vocabulary before it trains: `pema_adapters.shrink_embeddings(model, "task", dataset)`.

    Args:
        unseen: what a token outside the partial vocabulary gets when the adapter is active: its row of the base matrix
            ("base"), or an `UnseenTokenError` ("error").

    Raises:
        ValueError: another value of `unseen`.
    """

    unseen: Literal["base", "error"] = "base"

    architecture: str | None = "pema"

    def __post_init__(self) -> None:
        if self.unseen not in ("base", "error"):
            raise ValueError(f'PEMAConfig: unseen is {self.unseen!r}, expected "base" or "error"')
