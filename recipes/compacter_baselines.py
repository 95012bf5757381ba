"""The methods that the Compacter paper compares, each with and without PEMA.

Mahabadi, Henderson and Ruder, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", sections 5.1, 5.2 and 5.5,
in the terms of `adapters`; and LoRA and (IA)^3, which are not in it. A method says which adapter trains, and which of
the model's own weights train beside it.

    model = AutoModelForSequenceClassification.from_pretrained(base)
    prepare(model, "Compacter", TRAINED, PartialVocabulary.from_dataset(data, vocab_size=model.config.vocab_size))
    ...                                     # a Trainer, or a loop of your own, over what requires a gradient
    save(model, "run")                      # and load(fresh_model, "Compacter", TRAINED, vocabulary, "run")

The paper's settings are those of its section 5.5 and Table 3, for T5-base: bottleneck 24 with GeLU, prompts of 100
tokens, n = 4 for Compacter, and n = 12 for PHM-Adapter, the only n of its Table 6 that gives Table 3's 0.179 %.
Intrinsic-SAID is not here: adapters does not have it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
from adapters import (
    AdapterConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    PromptTuningConfig,
    SeqBnConfig,
)
from safetensors.torch import load_file, save_file
from torch import nn

import pema_adapters
from pema_adapters import PartialVocabulary, PEMAConfig

TASK = "task"
BOTTLENECK = 24
PROMPT_LENGTH = 100
COMPACTER_N, PHM_N = 4, 12
DROPPED = 5 / 12
"""Of T5-base's 12 layers AdapterDrop leaves out the first 5; of other depths, as many in proportion."""

PAPER, TRAINED, FROZEN = "paper", "rows trained", "rows frozen"
COLUMNS = {
    PAPER: "without PEMA, as in the paper: the embedding matrix is whole, and frozen but in full fine-tuning",
    TRAINED: "with PEMA: K rows of the matrix, and they train, too",
    FROZEN: "with PEMA for the memory alone: K rows, frozen",
}
BASE_WEIGHTS = "base_weights.safetensors"
"""Where `save` puts the model's own trained weights, for which adapters has no place in an adapter."""


@dataclass(frozen=True)
class Method:
    """How one method is set up.

    Attributes:
        config: the adapter's config for a model's config; None where there is no adapter.
        trains: whether the own weight of this name in a module of the model trains. The head of the task always does.
        start: a last touch to the adapter, given the model and the vocabulary.
    """

    config: Callable[[Any], AdapterConfig] | None
    trains: Callable[[nn.Module, str], bool]
    start: Callable[[Any, PartialVocabulary], None] = lambda model, vocabulary: None


def everything(module: nn.Module, name: str) -> bool:
    return True


def biases(module: nn.Module, name: str) -> bool:
    return name == "bias"


def layer_norms(module: nn.Module, name: str) -> bool:
    """The paper trains them beside every kind of adapter; adapters freezes them and has no option for it."""
    return isinstance(module, nn.LayerNorm)


def nothing(module: nn.Module, name: str) -> bool:
    return False


def adapter(config: Any) -> AdapterConfig:
    return DoubleSeqBnConfig(**bottleneck(config))


def pfeiffer_adapter(config: Any) -> AdapterConfig:
    """After self-attention, which the paper found to be the better place; the default of adapters is the other one."""
    return SeqBnConfig(mh_adapter=True, output_adapter=False, **bottleneck(config))


def adapter_drop(config: Any) -> AdapterConfig:
    dropped = list(range(round(DROPPED * config.num_hidden_layers)))
    return DoubleSeqBnConfig(leave_out=dropped, **bottleneck(config))


def adapter_low_rank(config: Any) -> AdapterConfig:
    """A matrix as the product of two vectors: a hypercomplex layer with n = 1, whose rule is the number 1."""
    return DoubleSeqBnConfig(phm_layer=True, phm_dim=1, learn_phm=False, **bottleneck(config))


def phm_adapter(config: Any) -> AdapterConfig:
    return DoubleSeqBnConfig(
        phm_layer=True, phm_dim=PHM_N, factorized_phm_W=False, shared_phm_rule=False, **bottleneck(config)
    )


def compacter(config: Any) -> AdapterConfig:
    return CompacterConfig(phm_dim=COMPACTER_N, **bottleneck(config))


def compacter_plus_plus(config: Any) -> AdapterConfig:
    return CompacterPlusPlusConfig(phm_dim=COMPACTER_N, **bottleneck(config))


def prompt_tuning(config: Any) -> AdapterConfig:
    return PromptTuningConfig(prompt_length=PROMPT_LENGTH)


def lora(config: Any) -> AdapterConfig:
    """Not in the paper: as Hu et al. set it for RoBERTa-base."""
    return LoRAConfig(r=8, alpha=8, attn_matrices=["q", "v"])


def ia3(config: Any) -> AdapterConfig:
    """Not in the paper: keys, values and the inner layer, as Liu et al. have it."""
    return IA3Config()


def bottleneck(config: Any) -> dict[str, Any]:
    """Return a reduction factor for the bottleneck: adapters rounds down, the half makes up for that."""
    return {"reduction_factor": config.hidden_size / (BOTTLENECK + 0.5), "non_linearity": "gelu"}


def rule_of_one(model: Any, vocabulary: PartialVocabulary) -> None:
    """Set the rule to 1 and freeze it: adapters initializes it near 0, and trains it whatever `learn_phm` says."""
    rule = model.base_model.shared_parameters[TASK]["phm_rule"]
    rule.data.fill_(1.0)
    rule.requires_grad_(False)


def prompt_of_tokens(model: Any, vocabulary: PartialVocabulary) -> None:
    """Start the prompt from embedding rows, read through the model, which may hold only K of them.

    adapters has `prompt_init="from_string"`, which needs `config.tokenizer_name_or_path`: no tokenizer is needed here.
    """
    with torch.no_grad():
        rows = model.get_input_embeddings()(torch.from_numpy(prompt_ids(vocabulary)))
        prompt_embedding(model).weight.copy_(rows)


def prompt_ids(vocabulary: PartialVocabulary) -> Any:
    """Return ids for the prompt's tokens, spread over the vocabulary; the paper does not name its own."""
    places = (np.arange(PROMPT_LENGTH) + 0.5) * len(vocabulary) / PROMPT_LENGTH
    return vocabulary.token_ids[places.astype(int)].astype(np.int64)


def prompt_embedding(model: Any) -> nn.Embedding:
    return model.base_model.prompt_tuning.prompt_tunings[TASK].prompt_embedding


METHODS = {
    "Full fine-tuning": Method(None, everything),
    "Adapter": Method(adapter, layer_norms),
    "Pfeiffer-Adapter": Method(pfeiffer_adapter, layer_norms),
    "AdapterDrop": Method(adapter_drop, layer_norms),
    "Adapter-LowRank": Method(adapter_low_rank, layer_norms, rule_of_one),
    "Prompt Tuning-R": Method(prompt_tuning, nothing),
    "Prompt Tuning-T": Method(prompt_tuning, nothing, prompt_of_tokens),
    "BitFit": Method(None, biases),
    "PHM-Adapter": Method(phm_adapter, layer_norms),
    "Compacter": Method(compacter, layer_norms),
    "Compacter++": Method(compacter_plus_plus, layer_norms),
    "LoRA": Method(lora, nothing),
    "(IA)^3": Method(ia3, nothing),
}


def can_freeze_rows() -> bool:
    """Whether this version of pema_adapters has `PEMAConfig(trainable=False)`."""
    return "trainable" in {field.name for field in fields(PEMAConfig)}


def prepare(model: Any, name: str, column: str, vocabulary: PartialVocabulary) -> PartialVocabulary:
    """Set `model`, fresh from its checkpoint, up to train a task. Returns the vocabulary whose rows are in memory.

    Args:
        model: a Transformers model with a head; changed in place.
        name: one of `METHODS`.
        column: one of `COLUMNS`.
        vocabulary: the ids that the data use.
    """
    method = METHODS[name]
    parts = _parts(method, column, model.config)
    if parts:
        adapters.init(model)
        model.add_adapter(TASK, config=parts[0] if len(parts) == 1 else ConfigUnion(*parts))
    used = PartialVocabulary(range(vocabulary.vocab_size), vocabulary.vocab_size)
    if column != PAPER:
        used = pema_adapters.shrink_embeddings(model, TASK if parts else None, vocabulary)
    if parts:
        model.train_adapter(TASK)
    _set_trained(model, method, trains_matrix=not parts and (column == TRAINED or method.trains is everything))
    method.start(model, vocabulary)
    model.train()
    return used


def _parts(method: Method, column: str, config: Any) -> list[AdapterConfig]:
    """Return the configs of the adapter; full fine-tuning needs none."""
    parts = [] if method.config is None else [method.config(config)]
    if column == FROZEN:
        return [PEMAConfig(trainable=False), *parts]
    return [PEMAConfig(), *parts] if column == TRAINED and parts else parts


def _set_trained(model: Any, method: Method, *, trains_matrix: bool) -> None:
    matrix = model.get_input_embeddings().weight
    for module, name, parameter in own_weights(model):
        parameter.requires_grad_(trains_matrix if parameter is matrix else method.trains(module, name))


def own_weights(model: Any) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the weights of the pretrained model, without head and adapter, as (module, name in it, weight)."""
    for path, module in model.base_model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not _in_adapter(f"{path}.{name}"):
                yield module, name, parameter


def _in_adapter(name: str) -> bool:
    return f".{TASK}." in f".{name}."


def trained_parameters(model: Any) -> tuple[int, int]:
    """Count trained parameters: of the model with its adapter, as the paper counts, and of the head."""
    body = {id(p): p.numel() for p in model.base_model.parameters() if p.requires_grad}
    total = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    return sum(body.values()), sum(total.values()) - sum(body.values())


def save(model: Any, folder: str | Path) -> None:
    """Write the trained weights, and nothing else."""
    folder = Path(folder)
    if _has_own_rows(model):
        pema_adapters.save_delta(model, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    has_adapter = hasattr(model, "adapters_config")
    if has_adapter:
        model.save_adapter(str(folder), TASK, use_safetensors=True)
    trained = dict(_trained_own_weights(model, with_head=not has_adapter))
    if trained:
        save_file(trained, folder / BASE_WEIGHTS)


def _has_own_rows(model: Any) -> bool:
    """Whether rows train without an adapter."""
    return not hasattr(model, "adapters_config") and hasattr(model.get_input_embeddings(), "token_ids")


def _trained_own_weights(model: Any, *, with_head: bool) -> Iterator[tuple[str, torch.Tensor]]:
    inside = "" if with_head else model.base_model_prefix + "."
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.startswith(inside) and not _in_adapter(name):
            yield name, parameter.detach().contiguous()


def load(model: Any, name: str, column: str, vocabulary: PartialVocabulary, folder: str | Path) -> None:
    """Prepare a fresh `model` and give it what `save` wrote."""
    folder = Path(folder)
    prepare(model, name, column, vocabulary)
    if hasattr(model, "adapters_config"):
        model.load_adapter(str(folder), use_safetensors=True, set_active=True)
    for path in [folder / BASE_WEIGHTS, folder / "model.safetensors"]:
        if path.exists():
            model.load_state_dict(load_file(path), strict=False)
