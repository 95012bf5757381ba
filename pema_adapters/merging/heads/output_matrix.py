"""The output matrix that a delta unties from the embedding: where the merged model finds it.

The artifact has it by its name in the model that was trained. That of a flexible head, `heads.task.3.weight`, is the
name in no checkpoint: the matrix goes where the head goes.
"""

import re
from dataclasses import replace
from typing import Any

from pema_adapters.errors import MergeError
from pema_adapters.formats.checkpoint import CONFIG, Checkpoint
from pema_adapters.formats.delta import Delta, Head
from pema_adapters.merging.heads.registry import DEFAULTS, STANDARD, Standard, is_language_model

_FLEXIBLE = re.compile(r"heads\.(?P<head>[^.]+)\.\d+\.weight")
_LM = "_lm"


def place_output(base: Checkpoint, delta: Delta) -> tuple[Delta, list[str]]:
    """Put the untied output matrix where the merged model looks for it.

    That is the output of the head's class, the flexible head itself, or the base's own head where the delta has none.

    Returns:
        The delta with that name in `untied`, and what there is to note.

    Raises:
        MergeError: the base's class is not known.
    """
    found, head = _FLEXIBLE.fullmatch(delta.untied), delta.head
    if found is None:
        return delta, []
    if head is not None and head.output_matrix:
        return replace(delta, untied=head.output_matrix), []
    if head is not None and is_of_language_model(head):
        return replace(delta, untied=_last_layer(head), is_output_in_head=True), []
    name = _find_output_of_base(base, delta) if head is None else ""
    if name:
        return replace(delta, untied=name), []
    note = f"the head {found['head']!r} of the trained model is not part of the delta; the output stays tied to E"
    return replace(delta, untied=""), [note]


def is_of_language_model(head: Head) -> bool:
    """Return whether a flexible head gives logits over the vocabulary."""
    config = head.config.get("config")
    kind = str(config.get("head_type")) if isinstance(config, dict) else ""
    return kind in DEFAULTS and kind.endswith(_LM)


def head_with_output(base: Checkpoint, delta: Delta, embedding: str) -> Head | None:
    """Add the base's matrix to a flexible head that is untied and stays with its adapter; any other stays as it is."""
    head, matrix = delta.head, base.tensors.get(embedding)
    if head is None or not delta.is_output_in_head or matrix is None:
        return head
    return replace(head, tensors={**head.tensors, delta.untied: replace(matrix, name=delta.untied)})


def _last_layer(head: Head) -> str:
    """Name the weight of the last linear layer: a flexible head counts layers, activations and norms alike."""
    config: dict[str, Any] = {**DEFAULTS[head.config["config"]["head_type"]], **head.config["config"]}
    each = 1 + bool(config["activation_function"]) + bool(config["layer_norm"])
    return f"heads.{head.config['name']}.{(config['layers'] - 1) * each}.weight"


def _find_output_of_base(base: Checkpoint, delta: Delta) -> str:
    """Name the output matrix of the class that the base's config.json names; "" where it has none."""
    named = base.config.get("architectures")
    model_class = str(named[0]) if isinstance(named, list) and named else ""
    family = STANDARD.get(str(base.config.get("model_type")))
    for kind, head in family.heads.items() if family else ():
        is_known = family is not None and isinstance(head, Standard) and family.name + head.suffix == model_class
        if is_known and isinstance(head, Standard):
            return f"{head.layers[-1]}.weight" if kind.endswith(_LM) else ""
    if is_language_model(model_class):
        raise MergeError(
            f"{base.folder / CONFIG}: {model_class} is not known, so there is no place for {delta.untied!r}, which the "
            'delta unties from the embedding; train with PEMAConfig(output_embeddings="tied")'
        )
    return ""
