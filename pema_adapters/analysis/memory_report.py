"""Predict the memory that PEMA saves, before any weights are loaded: exact sums over a model's parameters.

    report = memory_report("FacebookAI/xlm-roberta-base", vocabulary)
    report.parameters, report.parameters_saved, report.saved.total

The report counts full fine-tuning as `load_model` sets it up. Bytes per parameter (gradient and moments only of those
that train):

    optimizer    weight  gradient  two moments  example
    adamw_fp32   4       4         8            torch.optim.AdamW, a model in float32
    adamw_bf16   2       2         4            torch.optim.AdamW, a model in bfloat16
    adamw_8bit   4       4         2            bitsandbytes.optim.AdamW8bit, a model in float32

torch's AdamW adds a step counter of 4 bytes per tensor. For 8 bits the report ignores the block scales (1.6 % of
the moments), and that bitsandbytes keeps tensors of fewer than 4,096 elements in 32 bits. Transformers' Trainer
(`optim="adamw_8bit"`) keeps the moments of all embeddings in 32 bits; there PEMA saves 8 bytes per parameter, not 2.
Activations, buffers and memory that a framework reserves are not counted: they are the same with and without PEMA.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from pema_adapters.errors import FormatError, VocabularyError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BytesPerParam:
    """Bytes per parameter of the weight, the gradient and the two moments; `step` is per tensor."""

    weight: int
    gradient: int
    moments: int
    step: int


OPTIMIZERS: Mapping[str, BytesPerParam] = {
    "adamw_fp32": BytesPerParam(4, 4, 8, 4),
    "adamw_bf16": BytesPerParam(2, 2, 4, 4),
    "adamw_8bit": BytesPerParam(4, 4, 2, 0),
}

# names of classes that train with their head end in one of these
GENERATIVE_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs."""

    weights: int
    gradients: int
    optimizer_states: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer_states

    def __sub__(self, other: Memory) -> Memory:
        return Memory(
            self.weights - other.weights,
            self.gradients - other.gradients,
            self.optimizer_states - other.optimizer_states,
        )

    def to_dict(self) -> dict[str, int]:
        """Return a JSON-ready dictionary, with the total."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class MemoryReport:
    """The memory of full fine-tuning without (`before`) and with (`after`) a partial embedding.

    Attributes:
        model: the name of the model, or its class.
        built: the class whose parameters are counted.
        optimizer: a key of OPTIMIZERS.
        vocab_size: V.
        partial_vocab_size: K, including the ids that the model inserts itself.
        embedding_dim: d.
        embedding_rows_saved: V - K.
        parameters: the parameters of the model without PEMA.
        parameters_saved: the parameters that need not be in memory: (V - K) d; -K d where a tied head holds the matrix.
        trained_parameters_saved: the parameters that need not be trained: (V - K) d.
        has_tied_head: whether the language-model head is tied to the embedding.
        logits_per_token: bytes of the logits and their gradient, for each token with a label, that a tied head makes
            without PEMA and not with it: 2 V numbers. Not part of `before` and `after`. 0 without a tied head.
        before: bytes without PEMA.
        after: bytes with PEMA.
    """

    model: str
    built: str
    optimizer: str
    vocab_size: int
    partial_vocab_size: int
    embedding_dim: int
    embedding_rows_saved: int
    parameters: int
    parameters_saved: int
    trained_parameters_saved: int
    has_tied_head: bool
    logits_per_token: int
    before: Memory
    after: Memory

    @property
    def saved(self) -> Memory:
        """The difference `before - after`."""
        return self.before - self.after

    def __str__(self) -> str:
        """Format as a table: rows, parameters, and bytes without PEMA, with it, and saved."""
        head = (
            f"{self.model} ({self.built}), {self.optimizer}: {self.partial_vocab_size:,} of {self.vocab_size:,} rows "
            f"of {self.embedding_dim:,}, {self.parameters_saved:,} of {self.parameters:,} parameters saved"
        )
        lines = [f"{'':16}  {'before':>10}  {'after':>10}  {'saved':>10}"]
        for name in ("weights", "gradients", "optimizer_states", "total"):
            sizes = [getattr(part, name) / 1e6 for part in (self.before, self.after, self.saved)]
            lines.append(f"{name.replace('_', ' '):16}  " + "  ".join(f"{size:>7,.1f} MB" for size in sizes))
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary, with the bytes saved and the totals."""
        sums = {name: getattr(self, name).to_dict() for name in ("before", "after", "saved")}
        return {**asdict(self), **sums}


def memory_report(
    model_or_config: Any,
    vocabulary: Any,
    optimizer: str = "adamw_fp32",
    *,
    model_class: Any = None,
    output_storage: Literal["disk", "host", "device"] = "disk",
) -> MemoryReport:
    """Predict the memory that full fine-tuning with the rows of `vocabulary` saves.

    Args:
        model_or_config: a Transformers model, a config, a folder or a Hub id. No weights are read: for anything but a
            model, one is built on the meta device.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one. The ids that the model inserts itself
            (pad, bos, eos, decoder start) are added, as in `load_model`.
        optimizer: a key of OPTIMIZERS, which also sets the dtype of weights and gradients.
        model_class: the Transformers class or Auto class to build. Default: the config's architecture if it generates
            text (and so trains with its head), else the model without a head.
        output_storage: as in `PEMAConfig`; "device" counts the matrix of a tied head among the weights. "auto" is
            "disk" on a CPU.

    Raises:
        VocabularyError: the optimizer is unknown, or the vocabulary's V differs from the model's.
        SurgeryError: the model has no token embedding.
        FormatError: the config does not exist, or no model can be built from it.
    """
    from pema_adapters.training.base.model_vocabulary import complete_vocabulary, get_input_embedding
    from pema_adapters.training.output.tied_head import has_tied_head

    if optimizer not in OPTIMIZERS:
        raise VocabularyError(f"optimizer is {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    given = os.fspath(model_or_config) if isinstance(model_or_config, os.PathLike) else model_or_config
    model = given if _is_model(given) else build_on_meta(given, model_class)
    embedding = get_input_embedding(model)
    used = complete_vocabulary(model, embedding.num_embeddings, vocabulary)
    is_tied = has_tied_head(model, embedding)
    counts = ParamCounts.count(model, embedding)
    after = counts.shrink(len(used), keeps_matrix=is_tied and output_storage == "device")
    rates = OPTIMIZERS[optimizer]
    return MemoryReport(
        model=given if isinstance(given, str) else model.name_or_path or type(model).__name__,
        built=type(model).__name__,
        optimizer=optimizer,
        vocab_size=used.vocab_size,
        partial_vocab_size=len(used),
        embedding_dim=embedding.embedding_dim,
        embedding_rows_saved=used.vocab_size - len(used),
        parameters=counts.held,
        parameters_saved=counts.held - after.held,
        trained_parameters_saved=counts.trained - after.trained,
        has_tied_head=is_tied,
        logits_per_token=2 * used.vocab_size * rates.weight if is_tied else 0,
        before=counts.compute_memory(rates),
        after=after.compute_memory(rates),
    )


def build_on_meta(config: Any, model_class: Any = None, *, trust_remote_code: bool = False) -> Any:
    """Build a model on the meta device, where weights have shapes but no memory.

    Args:
        config: a config, a folder or a Hub id.
        model_class: as for `memory_report`.
        trust_remote_code: run the code of the repository.

    Raises:
        FormatError: the config does not exist, or no model can be built from it.
    """
    import torch

    from pema_adapters.training.guards import refuse_hub_kernel

    name, config = _resolve_config(config, trust_remote_code)
    model_class = model_class or _select_class(config)
    if not trust_remote_code:
        refuse_hub_kernel(config, name)
    try:
        with torch.device("meta"):
            if hasattr(model_class, "from_config"):
                return model_class.from_config(config, trust_remote_code=trust_remote_code)
            return model_class(config)
    except Exception as error:  # of any class: model code does not validate its config
        raise FormatError(f"{name}: cannot build {model_class.__name__} from this config: {error}") from error


def _resolve_config(config: Any, trust_remote_code: bool) -> tuple[str, Any]:
    """Return the name of a model in errors, and its config."""
    from transformers import PretrainedConfig

    from pema_adapters.hub.pretrained import load_config

    if isinstance(config, str):
        return config, load_config(config, trust_remote_code)
    if isinstance(config, PretrainedConfig):
        return config.name_or_path or type(config).__name__, config
    raise FormatError(f"found a {type(config).__name__}, expected a Transformers model, a config, a folder or a Hub id")


def _select_class(config: Any) -> Any:
    import transformers

    trained = (getattr(config, "architectures", None) or [""])[0]
    own = getattr(transformers, trained, None) if trained.endswith(GENERATIVE_SUFFIXES) else None
    return own or transformers.AutoModel


def _is_model(thing: Any) -> bool:
    return hasattr(thing, "get_input_embeddings")


@dataclass(frozen=True)
class ParamCounts:
    """The parameters of a model.

    Attributes:
        held: parameters in memory.
        trained: those that train.
        trained_tensors: the tensors that train.
        matrix: parameters of the embedding matrix, V d, or K d once shrunk.
        dim: d.
        trains_matrix: whether the embedding matrix trains.
    """

    held: int
    trained: int
    trained_tensors: int
    matrix: int
    dim: int
    trains_matrix: bool

    @classmethod
    def count(cls, model: Any, embedding: nn.Embedding) -> ParamCounts:
        """Count each parameter once. E counts with V rows even if the model is shrunk; a frozen E does not train."""
        others = [parameter for parameter in model.parameters() if parameter is not embedding.weight]
        trained = [parameter for parameter in others if parameter.requires_grad]
        matrix = embedding.num_embeddings * embedding.embedding_dim
        trains = embedding.weight.requires_grad
        return cls(
            held=sum(parameter.numel() for parameter in others) + matrix,
            trained=sum(parameter.numel() for parameter in trained) + matrix * trains,
            trained_tensors=len(trained) + trains,
            matrix=matrix,
            dim=embedding.embedding_dim,
            trains_matrix=trains,
        )

    def shrink(self, rows: int, keeps_matrix: bool) -> ParamCounts:
        """Replace E by K rows; with `keeps_matrix`, a tied head holds E as well, frozen."""
        partial = rows * self.dim
        return ParamCounts(
            held=self.held + partial - (0 if keeps_matrix else self.matrix),
            trained=self.trained + (partial - self.matrix) * self.trains_matrix,
            trained_tensors=self.trained_tensors,
            matrix=partial,
            dim=self.dim,
            trains_matrix=self.trains_matrix,
        )

    def compute_memory(self, rates: BytesPerParam) -> Memory:
        """Return the bytes of weights, gradients and optimizer states."""
        states = rates.moments * self.trained + rates.step * self.trained_tensors
        return Memory(rates.weight * self.held, rates.gradient * self.trained, states)
