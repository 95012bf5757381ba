"""The one parser of adapter_config.json: an adapter's name, and the methods that it combines.

"config" holds one method or a union of several. A method is a dictionary of settings, or a string as `add_adapter`
accepts it: `"lora[r=8]"`, `"pema|compacter"`.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError
from pema_adapters.formats.json_object import read_json
from pema_adapters.io.safe_paths import is_folder_name

ADAPTER_CONFIG = "adapter_config.json"
PEMA = "pema"
UNION = "union"
_WEIGHT_SPACE = "lora"
"""The "architecture" of LoRA, DoRA, (IA)^3 and VeRA."""

_BOTTLENECK: dict[str, Any] = {"architecture": None}
_COMPACTER = {**_BOTTLENECK, "phm_layer": True}
_INVERTIBLE = {**_BOTTLENECK, "inv_adapter": "nice"}
_LORA = {"architecture": _WEIGHT_SPACE}
_PREFIX, _REFT = {"architecture": "prefix_tuning"}, {"architecture": "reft"}
_METHOD_NAMES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("seq_bn", "pfeiffer", "double_seq_bn", "houlsby", "par_bn", "parallel"), _BOTTLENECK),
    **dict.fromkeys(("scaled_par_bn", "scaled_parallel"), _BOTTLENECK),
    **dict.fromkeys(("seq_bn_inv", "pfeiffer+inv", "double_seq_bn_inv", "houlsby+inv"), _INVERTIBLE),
    **dict.fromkeys(("compacter", "compacter++"), _COMPACTER),
    **dict.fromkeys(("prefix_tuning", "prefix_tuning_flat"), _PREFIX),
    **dict.fromkeys(("loreft", "noreft", "direft"), _REFT),
    "lora": _LORA,
    "ia3": {**_LORA, "composition_mode": "scale"},
    "dora": {**_LORA, "use_dora": True},
    "vera": {**_LORA, "vera_d": 0.1, "vera_b": 0.0},
    "dvora": {**_LORA, "use_dora": True, "vera_d": 0.1, "vera_b": 0.0},
}
"""The settings that identify each method that adapters has a string for; any other string is its own architecture."""
_METHOD_PATTERN = re.compile(r"\s*(?P<name>[^\[\]|\s]+)\s*(?:\[(?P<options>[^\[\]]*)\])?\s*")


@dataclass(frozen=True)
class Method:
    """One method of an adapter.

    Attributes:
        content: The method as in the file, a dictionary or a string.
        settings: The same as a dictionary; for a string, only the settings that it names.
    """

    content: dict[str, Any] | str
    settings: Mapping[str, Any]

    @property
    def architecture(self) -> str | None:
        """The "architecture" in adapters' sense, None for a bottleneck."""
        return self.settings.get("architecture")

    @property
    def name(self) -> str:
        """The name of the method in adapters: "compacter", "dora"."""
        settings = self.settings
        if self.architecture is None:
            return "compacter" if settings.get("phm_layer") else "bottleneck"
        if not self.is_weight_space:
            return str(self.architecture)
        if settings.get("composition_mode") == "scale":
            return "ia3"
        is_dora, is_vera = bool(settings.get("use_dora") or settings.get("dora")), settings.get("vera_d") is not None
        return ("dvora" if is_dora else "vera") if is_vera else "dora" if is_dora else "lora"

    @property
    def is_pema(self) -> bool:
        """Whether this is PEMA."""
        return self.architecture == PEMA

    @property
    def trains_rows(self) -> bool:
        """Whether this is PEMA with trainable rows; frozen rows are the base's, and not saved."""
        return self.is_pema and self.settings.get("trainable") is not False

    @property
    def is_weight_space(self) -> bool:
        """Whether it changes weights of the base, rather than adding layers."""
        return self.architecture == _WEIGHT_SPACE

    @property
    def is_gated(self) -> bool:
        """Whether a gate, which depends on the input, scales it."""
        return bool(self.settings.get("use_gating"))

    @property
    def is_invertible(self) -> bool:
        """Whether it transforms the embedding's output, which language-model heads of AutoAdapterModel invert."""
        return bool(self.settings.get("inv_adapter") or self.settings.get("invertible_adapter"))


@dataclass(frozen=True)
class AdapterConfig:
    """A validated adapter_config.json.

    Attributes:
        path: The file.
        name: The adapter's name, which is also a valid folder name.
        methods: Its methods, at least one.
        content: The JSON object.
    """

    path: Path
    name: str
    methods: tuple[Method, ...]
    content: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read the configuration of the adapter in `folder`.

        Raises:
            FormatError: The file is missing or damaged.
        """
        return cls.parse(read_json(folder / ADAPTER_CONFIG), folder / ADAPTER_CONFIG)

    @classmethod
    def parse(cls, content: dict[str, Any], path: Path) -> "AdapterConfig":
        """Validate the content of the file at `path`.

        Raises:
            FormatError: It is damaged.
        """
        name = content.get("name")
        if not isinstance(name, str):
            raise FormatError(
                f"{path}: expected the name of the adapter, found {_abbreviate(name)}; save the adapter again"
            )
        if not is_folder_name(name):
            raise FormatError(
                f"{path}: adapter name {name!r} cannot be the name of a folder; load the adapter with "
                'load_as="task", say, and save it again'
            )
        return cls(path, name, _parse_methods(content.get("config"), path), content)

    @property
    def has_pema(self) -> bool:
        """Whether one of the methods is PEMA."""
        return any(method.is_pema for method in self.methods)

    @property
    def trains_rows(self) -> bool:
        """Whether one of the methods is PEMA with trainable rows, so that the artifact holds rows."""
        return any(method.trains_rows for method in self.methods)

    def without(self, is_dropped: Callable[[Method], bool]) -> "AdapterConfig | None":
        """Drop some methods; return None if none is left. A union of one method becomes that method."""
        left = tuple(method for method in self.methods if not is_dropped(method))
        if len(left) == len(self.methods):
            return self
        if not left:
            return None
        found: Any = left[0].content if len(left) == 1 else _build_union(self.content["config"], left)
        return replace(self, methods=left, content={**self.content, "config": found})


def _build_union(before: Any, methods: tuple[Method, ...]) -> Any:
    contents = [method.content for method in methods]
    return "|".join(map(str, contents)) if isinstance(before, str) else {**before, "configs": contents}


def _parse_methods(found: Any, path: Path) -> tuple[Method, ...]:
    members: Any = [found]
    if isinstance(found, str):
        members = found.split("|")
    elif isinstance(found, dict) and (found.get("architecture") == UNION or "configs" in found):
        members = found.get("configs")
    if not isinstance(members, list) or not members:
        raise FormatError(f'{path}: "configs" of the union is {_abbreviate(members)}; expected a list of methods')
    return tuple(_parse_method(member, path) for member in members)


def _parse_method(found: Any, path: Path) -> Method:
    if isinstance(found, str):
        return Method(found, _parse_string(found, path))
    architecture = found.get("architecture") if isinstance(found, dict) else 0
    if not isinstance(architecture, (str, type(None))) or architecture == UNION:
        raise FormatError(f"{path}: config holds {_abbreviate(found)}; expected a method, or a union of methods")
    return Method(found, found)


def _parse_string(text: str, path: Path) -> dict[str, Any]:
    """Parse a method given as a string: `_parse_string("lora[r=8]", path) == {"architecture": "lora", "r": 8}`."""
    found = _METHOD_PATTERN.fullmatch(text)
    try:
        pairs = re.sub(r"(\w+)\s*=", r"'\1':", (found and found["options"]) or "")
        options: Any = ast.literal_eval("{" + pairs + "}") or {}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        found = None
    if found is None or not isinstance(options, dict):
        raise FormatError(f'{path}: config holds {_abbreviate(text)}; expected a method such as "lora" or "lora[r=8]"')
    name = found["name"]
    return {**_METHOD_NAMES.get(name, {"architecture": name}), **options}


def _abbreviate(found: Any) -> str:
    text = json.dumps(found)
    return text if len(text) <= 80 else f"{text[:77]}..."
