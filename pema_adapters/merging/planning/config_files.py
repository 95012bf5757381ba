"""The JSON files of the output: config.json, the index of the shards, the configuration of what stays an adapter."""

import json
from typing import Any

from pema_adapters.formats.checkpoint import CONFIG, Checkpoint
from pema_adapters.formats.delta import Delta, Head
from pema_adapters.formats.weights import INDEX
from pema_adapters.merging.heads.labels import read_labels
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import BytesSegment, CopySegment
from pema_adapters.merging.planning.weight_files import WeightFiles

FROM_DELTA = ("architectures", "id2label", "label2id", "problem_type")
"""What a trained model's config.json says about its head; absent means Transformers' default."""
DTYPES_BY_CODE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""How config.json calls the dtypes of safetensors files."""


def json_file(name: str, content: dict[str, Any]) -> PlannedFile:
    """Plan a JSON file as Transformers writes them. Half a surrogate pair, legal only escaped, stays so."""
    text = json.dumps(content, indent=2, ensure_ascii=False).encode(errors="backslashreplace")
    return PlannedFile(name, (BytesSegment(text + b"\n"),))


def config_file(base: Checkpoint, delta: Delta, weights: WeightFiles) -> PlannedFile | None:
    """Plan config.json: the base's, byte for byte unless the head, the vocabulary or the dtype changed."""
    if base.config_file is None:
        return None
    made = dict(base.config)
    if delta.kind == "full":
        made = _update_model(made, delta.config)
    elif delta.static_head is not None and delta.static_head.config_changes is not None:
        made = _update_config(made, delta.static_head.config_changes)
    elif delta.static_head is not None:
        made = _update_head(made, delta.static_head)
    if weights.name_map.embedding and weights.vocab_size > base.tensors[weights.name_map.embedding].shape[0]:
        made["vocab_size"] = weights.vocab_size
    if delta.untied:
        made["tie_word_embeddings"] = False
    if weights.dtype is not None:
        made["torch_dtype" if "torch_dtype" in made else "dtype"] = DTYPES_BY_CODE[weights.dtype]
    if made == base.config:
        return PlannedFile(CONFIG, (CopySegment.whole(base.config_file),))
    return json_file(CONFIG, made)


def index_file(base: Checkpoint, weights: WeightFiles) -> PlannedFile | None:
    """Plan the index of the shards, where there are any: new tensors, new names, new total size."""
    weight_map = {tensor.name: weights.names[path] for path, made in weights.tensors.items() for tensor in made}
    weight_map = dict(sorted(weight_map.items()))
    if base.index is None or base.index_file is None:
        made = {"metadata": {"total_size": weights.size}, "weight_map": weight_map}
        return json_file(INDEX, made) if len(weights.tensors) > 1 else None
    unlisted = {weights.name_map.in_output(name) for name in base.tensors.keys() - base.index["weight_map"].keys()}
    weight_map = {name: file for name, file in weight_map.items() if name not in unlisted}
    added_bytes = weights.size - sum(tensor.nbytes for tensor in base.tensors.values())
    if weight_map == base.index["weight_map"] and added_bytes == 0:
        return PlannedFile(INDEX, (CopySegment.whole(base.index_file),))
    found = base.index.get("metadata")
    metadata = dict(found) if isinstance(found, dict) else {}
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] = weights.size if base.is_pickled else metadata["total_size"] + added_bytes
    return json_file(INDEX, {**base.index, "metadata": metadata, "weight_map": weight_map})


def _update_config(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Update a config with the settings of a head; None removes a key."""
    made = {key: value for key, value in config.items() if key not in settings}
    return {**made, **{key: value for key, value in settings.items() if value is not None}}


def _update_model(config: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in FROM_DELTA or key == "architectures"}
    return {**kept, **{key: trained[key] for key in FROM_DELTA if key in trained}}


def _update_head(config: dict[str, Any], head: Head) -> dict[str, Any]:
    """Update a config with class and labels of head_config.json; "LABEL_0", "LABEL_1" are Transformers' default."""
    made = dict(config)
    if isinstance(head.config.get("model_class"), str):
        made["architectures"] = [head.config["model_class"]]
    found = read_labels(head.config, head.path)
    if found and (found != {"LABEL_0": 0, "LABEL_1": 1} or "id2label" in config):
        made["id2label"] = {str(number): label for label, number in found.items()}
        made["label2id"] = found
    return made
