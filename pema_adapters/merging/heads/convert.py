"""Flexible heads of AutoAdapterModel -> heads of ordinary Transformers classes, where both compute exactly the same.

`standard.STANDARD` says which class that is and what it computes on top of the backbone. A flexible head that no class
equals for every input stays an adapter head.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from pema_adapters.errors import FormatError
from pema_adapters.formats.delta import HEAD_CONFIG, Head
from pema_adapters.formats.safetensors_header import FLOATS
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.merging.heads.labels import label_settings, read_labels
from pema_adapters.merging.heads.registry import DEFAULTS, HIDDEN, STANDARD, TIE, ModelFamily, Standard

_OTHERS = {"head_type", "label2id", "dropout_prob", "shift_labels", "vocab_size", "embedding_size"}
"""Settings of a flexible head that change nothing, or only shapes, in evaluation."""
_ABOVE_0, _FLAG = (("an integer above 0", (int,)), ("true or false", (bool,)))
_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(("num_labels", "num_choices", "layers", "embedding_size", "vocab_size"), _ABOVE_0),
    **dict.fromkeys(("use_pooler", "bias", "layer_norm"), _FLAG),
    "activation_function": ("a name or null", (str, type(None))),
    "label2id": ("{label: number} or null", (dict, type(None))),
}
_PLACES = {("labels", 1): (1,), ("labels", 2): (1, 4), ("vocab", 1): (0,), ("vocab", 3): (0, 2, 3)}
"""Where a flexible head (an nn.Sequential) has its weights, between dropout and activations, by their number."""
_PROBLEMS: dict[tuple[str, int | str | None], str] = {
    ("classification", 1): "regression",
    ("multilabel_classification", "any"): "multi_label_classification",
}
_SAME_ACTIVATION = {"swish": "silu"}


@dataclass(frozen=True)
class StandardHead:
    """A flexible head as the head of an ordinary class.

    tensors: by their names in that class. config: what config.json must say; None: the key must be absent.
    prefix: of the backbone in that class, "" if it has none (T5's classes differ in that).
    needs: tensors of the backbone, without prefix, that the class reads and not every checkpoint has (the pooler).
    zero: tensors that only the class adds: the base must lack them or have zeros.
    output: the output matrix of a language model, "" for other heads.
    """

    model_class: str
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    prefix: str
    needs: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    output: str = ""


def convert_head(head: Head, base_config: dict[str, Any], *, keeps_base_output: bool = False) -> StandardHead | str:
    """Return the class that computes what the flexible `head` does, or a short reason why it stays an adapter head.

    base_config: config.json of the base, but with the `vocab_size` and the `tie_word_embeddings` of the output.
    keeps_base_output: the output matrix is the base's own. An output matrix that is that, or tied to the embedding, is
    not among the tensors. Raises `FormatError` where head_config.json or a tensor is damaged.
    """
    found = _read_settings(head)
    known = _find_family(base_config.get("model_type"), found["head_type"])
    if isinstance(known, str):
        return known
    pair = _Pair(head, found, base_config, *known, keeps_base_output)
    return pair.difference() or pair.convert()


@dataclass(frozen=True)
class _Pair:
    """A flexible head (`found`: its settings) beside the standard head that may be the same."""

    head: Head
    found: dict[str, Any]
    base: dict[str, Any]
    family: ModelFamily
    standard: Standard
    keeps_base_output: bool

    def difference(self) -> str:
        """Explain why the class cannot take the head's place; "" if it can."""
        return self._silent() or self._other_layers() or self._other_setting() or self._other_size()

    def convert(self) -> StandardHead:
        """Return the head as one of the class. Raises `FormatError` if a tensor does not fit the settings."""
        standard, prefix = self.standard, self.standard.prefix
        said = {"architectures": [self._class], **label_settings(self._labels()), "problem_type": self._problem()}
        return StandardHead(
            model_class=self._class,
            tensors=self._rename_tensors(),
            config={**said, "num_labels": None},  # its number of labels is that of id2label
            prefix=self.family.prefix if prefix is None else prefix,
            needs=tuple(f"{standard.pooler}.{part}" for part in ("weight", "bias") if standard.pooler),
            zero=standard.zero,
            output=f"{standard.layers[-1]}.weight" if self._is_lm else "",
        )

    @property
    def _class(self) -> str:
        return self.family.name + self.standard.suffix

    @property
    def _is_lm(self) -> bool:
        return "layer_norm" in self.found

    @property
    def _hidden(self) -> int:
        return int(self.base[self.family.hidden])

    @property
    def _inner(self) -> int:
        key, default = self.standard.inner
        return int(self.base.get(key, self._hidden if default == HIDDEN else default))

    @property
    def _outputs(self) -> int:
        return int(self.base["vocab_size"] if self._is_lm else self.found.get("num_labels", 1))

    def _says(self, key: str, default: Any = None) -> Any:
        return self.base.get(key, self.family.tied if key == TIE else default)

    def _silent(self) -> str:
        """Return the size that config.json leaves open; "" if none."""
        inner = self.standard.inner[0]
        sizes = [self.family.hidden, *["vocab_size"] * self._is_lm, *[inner] * (inner in self.base)]
        wrong = [key for key in sizes if not _is_a(self.base.get(key), "layers")]
        return f"config.json of the base does not say {wrong[0]}" if wrong else ""

    def _other_layers(self) -> str:
        unknown = self.found.keys() - DEFAULTS[self.found["head_type"]].keys() - _OTHERS
        if unknown:
            return f"its setting {min(unknown)!r} is not known"
        ours, theirs = self._our_words(), self._their_words()
        return f"{self._class} has {theirs}; this head has {ours}" if ours != theirs else ""

    def _our_words(self) -> str:
        found = self.found
        layers, activation, norm = found["layers"], found["activation_function"], found.get("layer_norm", False)
        return _describe_head(layers, activation, norm, found.get("use_pooler"), found.get("bias", True))

    def _their_words(self) -> str:
        standard, count = self.standard, len(self.standard.layers)
        activation = standard.activation
        activation = self.base.get(*activation) if isinstance(activation, tuple) else activation
        pooler = bool(standard.pooler) if "use_pooler" in self.found else None
        return _describe_head(min(count, 2), activation, count == 3, pooler, standard.bias)

    def _other_setting(self) -> str:
        for key, value in self.standard.requires.items():
            wanted = self._hidden if value == HIDDEN else value
            if self._says(key, wanted) != wanted:
                return f"{self._class} is the same only with {key} {json.dumps(wanted)} in config.json"
        return ""

    def _other_size(self) -> str:
        found, outputs, inner = self.found, self._outputs, self._inner
        width = found.get("embedding_size", self.base.get("embedding_size", inner))
        if self._is_lm and width != inner:
            return f"{self._class} is {inner} wide before its output; this head is {width}"
        if self._is_lm and found.get("vocab_size", outputs) != outputs and self._rows() == {found["vocab_size"]}:
            return f"{self._class} has {outputs} outputs, one a token; this head has {found['vocab_size']}"
        if found["head_type"] == "question_answering" and outputs != 2:
            return f"{self._class} has 2 outputs, start and end; this head has {outputs}"
        numbers = sorted((found.get("label2id") or {}).values())
        count = found.get("num_labels", found.get("num_choices", 0))
        if numbers and (len(numbers) != count or numbers != list(range(count))):
            return f"it has {count} labels, its label2id {json.dumps(found['label2id'])[:100]}"
        return ""

    def _rows(self) -> set[int]:
        output = self._place(-1)
        return {t.shape[0] for name, t in self._own().items() if name.startswith(f"{output}.") and t.shape}

    def _labels(self) -> dict[str, int]:
        """Return the label settings; {} for a language model, and for choices without names."""
        found = read_labels({"num_labels": self.found.get("num_choices", 0), **self.found}, self.head.path)
        is_default = all(label == f"LABEL_{number}" for label, number in found.items())
        return {} if is_default and "num_labels" not in self.found else found

    def _problem(self) -> str | None:
        """Return the problem_type; Transformers finds out about classes that exclude each other by itself."""
        kind, count = self.found["head_type"], self.found.get("num_labels")
        return _PROBLEMS.get((kind, count)) or _PROBLEMS.get((kind, "any"))

    def _rename_tensors(self) -> dict[str, StoredTensor]:
        """Return the head's tensors, all checked, by their new names, without an output matrix of the base."""
        left, expected = self._own(), self._map_names()
        made: dict[str, StoredTensor] = {}
        is_of_base = self._is_lm and (self._says(TIE) or self.keeps_base_output)
        tied = f"{self._place(-1)}.weight" if is_of_base else ""
        for name, (new, shape) in expected.items():
            if name not in left and name != tied:
                raise FormatError(f"{self.head.path}: tensor {name!r} {list(shape)} expected, found none")
            if name in left:
                stored = _check_shape(left.pop(name), shape)
                made |= {new: replace(stored, name=new)} if name != tied else {}
        for name, stored in left.items():
            raise FormatError(f"{stored.path}: unexpected tensor {name!r}; expected {', '.join(expected)}")
        return made

    def _map_names(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in the flexible head -> name in the class, and shape."""
        standard, hidden, inner = self.standard, self._hidden, self._inner
        output = (self._outputs, inner)
        shapes = [*((inner, hidden), (inner,))[: len(standard.layers) - 1], output]
        made: dict[str, tuple[str, tuple[int, ...]]] = {}
        for i, (layer, shape) in enumerate(zip(standard.layers, shapes, strict=True)):
            made[f"{self._place(i)}.weight"] = (f"{layer}.weight", shape)
            made[f"{self._place(i)}.bias"] = (f"{layer}.bias", shape[:1])
        bias = made.pop(f"{self._place(-1)}.bias")
        if standard.bias:
            made[f"{self._place(-1)}.bias"] = (standard.bias_name or bias[0], bias[1])
        return made

    def _place(self, layer: int) -> str:
        places = _PLACES["vocab" if self._is_lm else "labels", len(self.standard.layers)]
        return f"heads.{self.head.config['name']}.{places[layer]}"

    def _own(self) -> dict[str, StoredTensor]:
        """Return all tensors but those of heads whose name begins with this one's, which `save_head` writes along."""
        start = f"heads.{self.head.config['name']}"
        found = self.head.tensors.items()
        return {name: t for name, t in found if not name.startswith(start) or name[len(start) :].startswith(".")}


def _read_settings(head: Head) -> dict[str, Any]:
    """Return the settings of a flexible head, checked, with defaults for absent ones."""
    where, config, name = head.path, head.config.get("config"), head.config.get("name")
    kind = config.get("head_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(kind, str) or not isinstance(name, str):
        found = json.dumps({"name": name, "config": config})[:200]
        raise FormatError(f"{where}: found {found}; expected the name and the config, with its head_type, of a head")
    for key, value in config.items():
        if kind in DEFAULTS and key in _TYPES and not _is_a(value, key):
            raise FormatError(f"{where}: {key} is {json.dumps(value)[:200]}; expected {_TYPES[key][0]}")
    return {**DEFAULTS.get(kind, {}), **config}


def _is_a(value: Any, key: str) -> bool:
    types = _TYPES[key][1]
    if isinstance(value, dict):
        return dict in types and all(type(number) is int for number in value.values())
    return isinstance(value, types) and (int not in types or (type(value) is int and value > 0))


def _find_family(model_type: Any, kind: str) -> tuple[ModelFamily, Standard] | str:
    family = STANDARD.get(model_type) if isinstance(model_type, str) else None
    found = family.heads.get("classification" if kind == "multilabel_classification" else kind) if family else None
    if family is None or found is None or kind not in DEFAULTS:
        return f"no Transformers class for a head of type {kind!r} on a base of type {model_type!r}"
    return family.name + found if isinstance(found, str) else (family, found)


def _describe_head(layers: int, activation: Any, norm: bool, pooler: bool | None, bias: bool) -> str:
    """Describe what a head computes. Two heads with equal descriptions compute the same from the same tensors."""
    made = ["1 layer" if layers == 1 else f"{layers} layers"]
    if layers > 1:
        name = str(activation or "no activation").lower()
        made += [_SAME_ACTIVATION.get(name, name), *(["layer norm"] if norm else [])]
    if pooler is not None:
        made += ["on the pooler" if pooler else "without pooler"]
    return ", ".join(made + ([] if bias else ["without output bias"]))


def _check_shape(stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    if stored.shape != shape or stored.dtype not in FLOATS:
        raise FormatError(
            f"{stored.path}: tensor {stored.name!r} is {stored.dtype} {list(stored.shape)}; "
            f"expected floats {list(shape)}, by {HEAD_CONFIG} and the base's config.json"
        )
    return stored
