"""Parameter groups for an optimizer, with a learning rate of their own for the embedding rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from pema_adapters.errors import SurgeryError
from pema_adapters.training.base.model_vocabulary import input_embedding
from pema_adapters.training.embedding.row_table import RowTable
from pema_adapters.training.upstream import private_names as _upstream


def parameter_groups(
    model: Any,
    *,
    lr: float | None = None,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
    embedding_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` for a torch optimizer: embedding rows apart from all others.

    Rows that come later (`PEMAConfig(vocabulary="grow")`) belong to the group as well. With a Trainer:
    `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, ...)), None))`.

    Args:
        model: shrunk and ready to train: `train_adapter` was called, or it comes from `load_model`.
        lr: learning rate of everything else; None: the optimizer's.
        embedding_lr: learning rate of the embedding rows; None: as `lr`.
        weight_decay: of everything else but biases and norms, which a Trainer does not decay either.
        embedding_weight_decay: of the embedding rows. 0, other than a Trainer's: a row would decay at every step, also
            where its token does not occur, and rows of tokens that the data lack would not.

    Returns:
        Up to three groups: embedding rows, decayed, and not decayed.

    Raises:
        SurgeryError: no embedding row trains.
    """
    rows = _embedding_weights(model)
    if not rows:
        raise SurgeryError(
            f"parameter_groups: no embedding row of {type(model).__name__} trains: call shrink_embeddings and "
            "model.train_adapter first"
        )
    decayed = _upstream.decayed_parameter_names(model)
    others = [(name, each) for name, each in model.named_parameters() if each.requires_grad and id(each) not in rows]
    groups = [
        _group(list(rows.values()), lr if embedding_lr is None else embedding_lr, embedding_weight_decay),
        _group([each for name, each in others if name in decayed], lr, weight_decay),
        _group([each for name, each in others if name not in decayed], lr, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _group(parameters: list[nn.Parameter], lr: float | None, weight_decay: float) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    return group if lr is None else {**group, "lr": lr}


def _embedding_weights(model: Any) -> dict[int, nn.Parameter]:
    """The weights of all tables of rows that train, and that of an embedding which is not shrunk."""
    tables = [module.weight for module in model.modules() if isinstance(module, RowTable)]
    weights = [*tables, input_embedding(model).weight]
    return {id(each): each for each in weights if isinstance(each, nn.Parameter) and each.requires_grad}
