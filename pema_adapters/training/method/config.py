"""How a user asks for PEMA: `PEMAConfig`, beside CompacterConfig and LoRAConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters.configuration.adapter_config import AdapterConfig

_EXPECTED: dict[str, tuple[str | bool | None, ...]] = {
    "unseen": ("base", "error"),
    "output_embeddings": ("tied", "full", None),
    "trainable": (True, False),
    "dtype": ("float32", "bfloat16", "float16", None),
    "vocabulary": ("grow", None),
}


@dataclass(eq=False)
class PEMAConfig(AdapterConfig):  # type: ignore[misc]
    """Partial Embedding Matrix Adaptation (Williams and Aletras, section 4): train the embedding rows that the data
    use.

    Combine it with another method in a `ConfigUnion(PEMAConfig(), CompacterConfig())`. An adapter with PEMA needs a
    vocabulary before it trains: `pema_adapters.shrink_embeddings(model, "task", dataset)`.

    Args:
        unseen: what a token outside the partial vocabulary gets when the adapter is active: its row of the base matrix
            ("base"), or an `UnseenTokenError` ("error").
        output_embeddings: for a language model whose head shares the matrix with the input (tied). "tied": the head
            uses the trained rows, too, and the base's for all other tokens, so that the loss is over the whole
            vocabulary and a merged model is tied as the base was. "full": the head keeps the base's matrix, which
            unties the two, and the merge writes two matrices. None: what keeps the model's meaning, "tied". Where
            nothing is tied, the head is an ordinary layer and this has no effect.
        trainable: False to keep the rows as they are, for the sake of the memory alone; the artifact has no rows then.
        dtype: of the trained rows, "float32" for a model in half precision, say; None: the model's. What the embedding
            gives is in the model's dtype.
        vocabulary: "grow" where the data cannot be scanned beforehand (a stream, reinforcement learning): every token
            that training meets gets a row, its base row at first, and the optimizer's state follows. Call
            `shrink_embeddings(model, "task")` without data first. The result is that of a scan beforehand, bit for bit
            where the optimizer treats each weight by itself (AdamW, SGD) without weight decay; with decay, a row
            decays from the step on at which it is met; Adafactor's means are over the rows met so far. In evaluation
            nothing grows. One process only; on a GPU it costs a synchronisation a step; a head that shares the matrix
            needs `output_embeddings="full"`. None: the vocabulary given to `shrink_embeddings`.

    Raises:
        ValueError: another value, or a vocabulary that grows where the rows do not train.
    """

    unseen: Literal["base", "error"] = "base"
    output_embeddings: Literal["tied", "full"] | None = None
    trainable: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    vocabulary: Literal["grow"] | None = None

    architecture: str | None = "pema"

    def __post_init__(self) -> None:
        for name, expected in _EXPECTED.items():
            if getattr(self, name) not in expected:
                options = " or ".join(f'"{one}"' if isinstance(one, str) else str(one) for one in expected)
                raise ValueError(f"PEMAConfig: {name} is {getattr(self, name)!r}, expected {options}")
        if self.vocabulary == "grow" and not self.trainable:
            raise ValueError(
                'PEMAConfig: vocabulary="grow" adds rows for them to train, but trainable=False trains none: '
                "leave out one of the two (rows that do not train are read from the base whatever the vocabulary)"
            )
