"""The JSON files of the output: config.json, the index of the shards, the configuration of what stays an adapter."""

import json
from typing import Any

from pema_adapters.formats.checkpoint import CONFIG, Checkpoint
from pema_adapters.formats.delta import Delta, Head
from pema_adapters.formats.weights import INDEX
from pema_adapters.merging.heads.labels import labels
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import Copy, Literal
from pema_adapters.merging.planning.weight_files import Layout

FROM_DELTA = ("architectures", "id2label", "label2id", "problem_type")
"""What a trained model's config.json says about its head; absent means Transformers' default."""
DTYPES_BY_CODE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""How config.json calls the dtypes of safetensors files."""


def json_file(name: str, content: dict[str, Any]) -> PlannedFile:
    """A JSON file of the output, as Transformers writes them. Half a surrogate pair, legal only escaped, stays so."""
    text = json.dumps(content, indent=2, ensure_ascii=False).encode(errors="backslashreplace")
    return PlannedFile(name, (Literal(text + b"\n"),))


def config_file(base: Checkpoint, delta: Delta, layout: Layout) -> PlannedFile | None:
    """config.json: the base's, byte for byte unless the head or the vocabulary changed."""
    if base.config_file is None:
        return None
    made = dict(base.config)
    if delta.kind == "full":
        made = _with_model(made, delta.config)
    elif delta.static_head is not None and delta.static_head.config_changes is not None:
        made = _with_settings(made, delta.static_head.config_changes)
    elif delta.static_head is not None:
        made = _with_head(made, delta.static_head)
    if layout.names.embedding and layout.vocab_size > base.tensors[layout.names.embedding].shape[0]:
        made["vocab_size"] = layout.vocab_size
    if delta.untied:
        made["tie_word_embeddings"] = False
    if layout.dtype is not None:
        made["torch_dtype" if "torch_dtype" in made else "dtype"] = DTYPES_BY_CODE[layout.dtype]
    if made == base.config:
        return PlannedFile(CONFIG, (Copy.whole(base.config_file),))
    return json_file(CONFIG, made)


def index_file(base: Checkpoint, layout: Layout) -> PlannedFile | None:
    """The index of the shards, where there are any: new tensors, new names, new total size."""
    weight_map = {e.name: layout.output_name(path) for path, entries in layout.entries.items() for e in entries}
    weight_map = dict(sorted(weight_map.items()))
    if base.index is None or base.index_file is None:
        made = {"metadata": {"total_size": layout.size}, "weight_map": weight_map}
        return json_file(INDEX, made) if len(layout.entries) > 1 else None
    unlisted = {layout.names.in_output(name) for name in base.tensors.keys() - base.index["weight_map"].keys()}
    weight_map = {name: file for name, file in weight_map.items() if name not in unlisted}
    if weight_map == base.index["weight_map"] and layout.grown_bytes == 0:
        return PlannedFile(INDEX, (Copy.whole(base.index_file),))
    found = base.index.get("metadata")
    metadata = dict(found) if isinstance(found, dict) else {}
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] = layout.size if base.is_pickled else metadata["total_size"] + layout.grown_bytes
    return json_file(INDEX, {**base.index, "metadata": metadata, "weight_map": weight_map})


def _with_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """With what a head says; None: the key goes."""
    made = {key: value for key, value in config.items() if key not in settings}
    return {**made, **{key: value for key, value in settings.items() if value is not None}}


def _with_model(config: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in FROM_DELTA or key == "architectures"}
    return {**kept, **{key: trained[key] for key in FROM_DELTA if key in trained}}


def _with_head(config: dict[str, Any], head: Head) -> dict[str, Any]:
    """`head_config.json` names the class and the labels; "LABEL_0", "LABEL_1" are Transformers' default."""
    made = dict(config)
    if isinstance(head.config.get("model_class"), str):
        made["architectures"] = [head.config["model_class"]]
    found = labels(head.config, head.path)
    if found and (found != {"LABEL_0": 0, "LABEL_1": 1} or "id2label" in config):
        made["id2label"] = {str(number): label for label, number in found.items()}
        made["label2id"] = found
    return made
