"""`PEMAConfig`, the config of PEMA among those of adapters (CompacterConfig, LoRAConfig)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters.configuration.adapter_config import AdapterConfig

_EXPECTED: dict[str, tuple[str | bool | None, ...]] = {
    "unseen": ("base", "error"),
    "output_embeddings": ("tied", "full", None),
    "output_storage": ("auto", "disk", "host", "device"),
    "trainable": (True, False),
    "dtype": ("float32", "bfloat16", "float16", None),
    "vocabulary": ("grow", None),
}


@dataclass(eq=False)
class PEMAConfig(AdapterConfig):  # type: ignore[misc]
    """Train only the embedding rows that the data use: Partial Embedding Matrix Adaptation (Williams & Aletras, §4).

    Combine it with another method in a `ConfigUnion(PEMAConfig(), CompacterConfig())`. An adapter with PEMA needs a
    vocabulary before it trains: `pema_adapters.shrink_embeddings(model, "task", dataset)`.

    Args:
        unseen: what happens to a token outside the partial vocabulary when the adapter is active. "base": it gets its
            row of the base matrix. "error": an `UnseenTokenError`.
        output_embeddings: for a language model whose head is tied to the input embedding; otherwise without effect.
            "tied" (and None): the head uses the trained rows as well, and the base's for all other tokens, so the loss
            is over the whole vocabulary and a merged model is tied as the base was. "full": the head keeps the base's
            matrix, which unties the two, and the merge writes two matrices.
        output_storage: where the base's matrix of a tied head is in training; the loss is exact in any case. "disk": in
            the checkpoint's file, read in blocks. "host": in host memory, copied to an accelerator in blocks. "device":
            on the model's device. "auto": disk for a model on the CPU; on an accelerator the device if the matrix takes
            at most half of its free memory, else the host.
        trainable: False to freeze the rows and save memory only; the artifact then contains no rows.
        dtype: of the trained rows; "float32" for a model in half precision, say. None: the model's. The output of the
            embedding is in the model's dtype in any case.
        vocabulary: None: the vocabulary given to `shrink_embeddings`. "grow": for data that cannot be scanned
            beforehand (a stream, reinforcement learning). Every token that training meets gets a row, which starts as
            its base row, with matching optimizer state; evaluation adds none. Call `shrink_embeddings(model, "task")`
            without data first. The result equals that of a scan beforehand, bit for bit if the optimizer treats each
            weight separately (AdamW, SGD) without weight decay. With decay, a row decays from the step that first
            meets it; Adafactor's means are over the rows met so far. It works in one process only, synchronises a GPU
            once a step, and needs `output_embeddings="full"` if the head is tied.

    Raises:
        ValueError: an unknown value, or `vocabulary="grow"` with `trainable=False`.
    """

    unseen: Literal["base", "error"] = "base"
    output_embeddings: Literal["tied", "full"] | None = None
    output_storage: Literal["auto", "disk", "host", "device"] = "auto"
    trainable: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    vocabulary: Literal["grow"] | None = None

    architecture: str | None = "pema"

    def __post_init__(self) -> None:
        for name, expected in _EXPECTED.items():
            if getattr(self, name) not in expected:
                options = " or ".join(f'"{each}"' if isinstance(each, str) else str(each) for each in expected)
                raise ValueError(f"PEMAConfig: {name} is {getattr(self, name)!r}, expected {options}")
        if self.vocabulary == "grow" and not self.trainable:
            raise ValueError(
                'PEMAConfig: vocabulary="grow" adds rows to train them, but trainable=False trains none: '
                "leave out one of the two (frozen rows are read from the base whatever the vocabulary)"
            )
