"""Parameter groups for an optimizer, so that embedding rows can have their own learning rate and weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from pema_adapters.errors import SurgeryError
from pema_adapters.training import upstream
from pema_adapters.training.base.model_vocabulary import get_input_embedding
from pema_adapters.training.embedding.row_table import RowTable


def parameter_groups(
    model: Any,
    *,
    lr: float | None = None,
    embedding_lr: float | None = None,
    weight_decay: float = 0.0,
    embedding_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` for a torch optimizer, with the embedding rows in their own group.

    The group includes rows that training adds later (`PEMAConfig(vocabulary="grow")`). With a Trainer:
    `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, ...)), None))`.

    Args:
        model: shrunk and ready to train: `train_adapter` was called, or it comes from `load_model`.
        lr: learning rate of all other parameters; None: the optimizer's default.
        embedding_lr: learning rate of the embedding rows; None: `lr`.
        weight_decay: of all other parameters except biases and norms, which a Trainer does not decay either.
        embedding_weight_decay: of the embedding rows. The default is 0, unlike a Trainer's: decay would shrink a row
            at every step, even when its token does not occur, and leave the rows outside the vocabulary alone.

    Returns:
        Up to three groups: embedding rows, decayed parameters, and parameters without decay.

    Raises:
        SurgeryError: no embedding row is trainable.
    """
    rows = _find_embedding_weights(model)
    if not rows:
        raise SurgeryError(
            f"parameter_groups: no embedding row of {type(model).__name__} trains: call shrink_embeddings and "
            "model.train_adapter first"
        )
    decayed = upstream.find_decayed_parameters(model)
    others = [(name, each) for name, each in model.named_parameters() if each.requires_grad and id(each) not in rows]
    groups = [
        _make_group(list(rows.values()), lr if embedding_lr is None else embedding_lr, embedding_weight_decay),
        _make_group([each for name, each in others if name in decayed], lr, weight_decay),
        _make_group([each for name, each in others if name not in decayed], lr, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _make_group(parameters: list[nn.Parameter], lr: float | None, weight_decay: float) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    return group if lr is None else {**group, "lr": lr}


def _find_embedding_weights(model: Any) -> dict[int, nn.Parameter]:
    """Return the trainable weights of all row tables, and that of an embedding that is not shrunk, by id."""
    tables = [module.weight for module in model.modules() if isinstance(module, RowTable)]
    weights = [*tables, get_input_embedding(model).weight]
    return {id(each): each for each in weights if isinstance(each, nn.Parameter) and each.requires_grad}
