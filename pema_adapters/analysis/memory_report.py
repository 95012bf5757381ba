"""What PEMA saves in memory, before anything is loaded or trained: exact sums over a model's parameters.

    report = memory_report("FacebookAI/xlm-roberta-base", vocabulary)
    report.parameters, report.parameters_saved, report.saved.total

Counted is full fine-tuning as `load_model` sets it up, per parameter that is held, and of those that train:

    optimizer    weight  gradient  two moments  as in
    adamw_fp32   4       4         8            torch.optim.AdamW, a model in float32
    adamw_bf16   2       2         4            torch.optim.AdamW, a model in bfloat16
    adamw_8bit   4       4         2            bitsandbytes.optim.AdamW8bit, a model in float32

torch's AdamW counts its steps in 4 bytes a tensor more. Left out for 8 bits: the scales of the blocks (1.6 % of the
moments), and that bitsandbytes keeps tensors of less than 4,096 elements in 32 bits; Transformers' Trainer
(`optim="adamw_8bit"`) keeps the moments of all embeddings in 32 bits, where PEMA saves 8 bytes a parameter and not 2.
Activations, buffers, and what a framework reserves are the same with and without PEMA, and not counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pema_adapters.errors import FormatError, VocabularyError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BytesPerParam:
    """Bytes: of a weight, its gradient, its two moments; and of the step counter of a tensor."""

    weight: int
    gradient: int
    moments: int
    step: int


OPTIMIZERS: Mapping[str, BytesPerParam] = {
    "adamw_fp32": BytesPerParam(4, 4, 8, 4),
    "adamw_bf16": BytesPerParam(2, 2, 4, 4),
    "adamw_8bit": BytesPerParam(4, 4, 2, 0),
}

GENERATIVE_SUFFIXES = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
)  # ends of classes that train with their head


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds."""

    weights: int
    gradients: int
    optimizer_states: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer_states

    def __sub__(self, other: Memory) -> Memory:
        return Memory(
            self.weights - other.weights,
            self.gradients - other.gradients,
            self.optimizer_states - other.optimizer_states,
        )

    def to_dict(self) -> dict[str, int]:
        """As a dictionary that `json.dumps` takes, with the total."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class MemoryReport:
    """Full fine-tuning without (`before`) and with (`after`) a partial embedding.

    model: name, or class; built: the class whose parameters are counted. optimizer: one of OPTIMIZERS.
    vocab_size: V. partial_vocab_size: K, with the ids that the model inserts itself. embedding_dim: d.
    embedding_rows_saved: V - K. parameters: of the whole model; trained_parameters_saved: (V - K) d;
    parameters_saved: of those held, the same but where has_tied_head: the language-model head is tied to the embedding
    and keeps the matrix, frozen, beside the K rows; then it is -K d, and what is saved is gradients and states alone.
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
    before: Memory
    after: Memory

    @property
    def saved(self) -> Memory:
        """before - after."""
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
        """As a dictionary that `json.dumps` takes, with what is saved, and totals."""
        sums = {name: getattr(self, name).to_dict() for name in ("before", "after", "saved")}
        return {**asdict(self), **sums}


def memory_report(
    model_or_config: Any, vocabulary: Any, optimizer: str = "adamw_fp32", *, model_class: Any = None
) -> MemoryReport:
    """What full fine-tuning with the rows of `vocabulary` saves in memory; the module's docstring says what counts.

    Args:
        model_or_config: a Transformers model, a config, a folder or a Hub id. No weights are read: but for a model,
            one is built on the meta device.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one. As in `load_model` the ids that the model
            inserts itself (pad, bos, eos, decoder start) come along.
        optimizer: a key of OPTIMIZERS. The dtype of weights and gradients goes with it, whatever the model is in.
        model_class: what to build of a config, a Transformers class or Auto class. Default: the config's architecture
            if that generates text, which is trained with its head, and else the model without a head.

    Raises:
        VocabularyError: an unknown optimizer, or a vocabulary of another size than the model's V.
        SurgeryError: a model without a token embedding.
        FormatError: no config of that name, one that no model can be built of, or neither a config nor a name.
    """
    from pema_adapters.training.base.model_vocabulary import complete_vocabulary, input_embedding
    from pema_adapters.training.output.tied_head import has_tied_head

    if optimizer not in OPTIMIZERS:
        raise VocabularyError(f"optimizer is {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
    given = os.fspath(model_or_config) if isinstance(model_or_config, os.PathLike) else model_or_config
    model = given if _is_model(given) else build_on_meta(given, model_class)
    embedding = input_embedding(model)
    used = complete_vocabulary(model, embedding.num_embeddings, vocabulary)
    is_tied = has_tied_head(model, embedding)
    counted = ParamCounts.count(model, embedding)
    after = counted.shrink(len(used), keeps_matrix=is_tied)
    return MemoryReport(
        model=given if isinstance(given, str) else model.name_or_path or type(model).__name__,
        built=type(model).__name__,
        optimizer=optimizer,
        vocab_size=used.vocab_size,
        partial_vocab_size=len(used),
        embedding_dim=embedding.embedding_dim,
        embedding_rows_saved=used.vocab_size - len(used),
        parameters=counted.held,
        parameters_saved=counted.held - after.held,
        trained_parameters_saved=counted.trained - after.trained,
        has_tied_head=is_tied,
        before=counted.compute_memory(OPTIMIZERS[optimizer]),
        after=after.compute_memory(OPTIMIZERS[optimizer]),
    )


def build_on_meta(config: Any, model_class: Any = None, *, trust_remote_code: bool = False) -> Any:
    """Build a model of a config, or of the config of a folder or Hub id; its weights have shapes and no memory.

    Code of a repository runs with `trust_remote_code` alone.

    Raises:
        FormatError: no config of that name, or one that no model can be built of.
    """
    import torch
    from transformers import PretrainedConfig

    from pema_adapters.hub.pretrained import load_config
    from pema_adapters.training.guards import refuse_hub_kernel

    if not isinstance(config, (str, PretrainedConfig)):
        raise FormatError(
            f"found a {type(config).__name__}, expected a Transformers model, a config, a folder or a Hub id"
        )
    name = config if isinstance(config, str) else config.name_or_path or type(config).__name__
    config = load_config(config, trust_remote_code) if isinstance(config, str) else config
    kind = model_class or _select_class(config)
    if not trust_remote_code:
        refuse_hub_kernel(config, name)
    try:
        with torch.device("meta"):
            if hasattr(kind, "from_config"):
                return kind.from_config(config, trust_remote_code=trust_remote_code)
            return kind(config)
    except Exception as error:  # whatever the code of a model says of a config that it was not made for
        raise FormatError(f"{name}: no {kind.__name__} can be built of this config: {error}") from error


def _select_class(config: Any) -> Any:
    import transformers

    trained = (getattr(config, "architectures", None) or [""])[0]
    own = getattr(transformers, trained, None) if trained.endswith(GENERATIVE_SUFFIXES) else None
    return own or transformers.AutoModel


def _is_model(thing: Any) -> bool:
    return hasattr(thing, "get_input_embeddings")


@dataclass(frozen=True)
class ParamCounts:
    """Parameters held, parameters and tensors that train, and what of them is the matrix E [V, d]."""

    held: int
    trained: int
    trained_tensors: int
    matrix: int
    dim: int
    trains_matrix: bool

    @classmethod
    def count(cls, model: Any, embedding: nn.Embedding) -> ParamCounts:
        """Each parameter once. E counts with V rows, shrunk or not, and is trained unless its weight is frozen."""
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
        """With K rows in the place of E, or beside it, frozen, where a head needs it."""
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
        """In bytes."""
        states = rates.moments * self.trained + rates.step * self.trained_tensors
        return Memory(rates.weight * self.held, rates.gradient * self.trained, states)
