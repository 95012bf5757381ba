"""adapter_config.json: every spelling of methods is parsed, everything else is refused."""

import json
from pathlib import Path

import adapters
import pytest

import pema_adapters
from pema_adapters.errors import FormatError
from pema_adapters.formats.adapter_config import AdapterConfig

PATH = Path("run/adapter_config.json")
PEMA, LORA = {"architecture": "pema", "unseen": "base"}, {"architecture": "lora", "r": 8, "alpha": 16}
BOTTLENECK, INVERTIBLE = {"architecture": None, "reduction_factor": 16}, {"architecture": None, "inv_adapter": "nice"}


def union(*members):
    return {"architecture": "union", "configs": list(members)}


def parsed(config, name="task"):
    return AdapterConfig.parse({"name": name, "config": config, "model_type": "bert"}, PATH)


def refused(content, text):
    with pytest.raises(FormatError, match=text) as error:
        AdapterConfig.parse(content, PATH)
    assert str(error.value).startswith("run/adapter_config.json: ") and "\n" not in str(error.value)


METHODS = [
    (PEMA, ["pema"]),
    ("pema", ["pema"]),
    (union(PEMA, LORA), ["pema", "lora"]),
    (union("pema", "seq_bn"), ["pema", "bottleneck"]),
    ("pema|lora[r=4, alpha=8]", ["pema", "lora"]),
    (" pema | compacter++ ", ["pema", "compacter"]),
    ("ia3|dora|vera|dvora", ["ia3", "dora", "vera", "dvora"]),
    ("prefix_tuning_flat|loreft|mam", ["prefix_tuning", "reft", "mam"]),
    (BOTTLENECK, ["bottleneck"]),
    ({}, ["bottleneck"]),
    ({"architecture": None, "phm_layer": True}, ["compacter"]),
    (LORA | {"composition_mode": "scale"}, ["ia3"]),
    (LORA | {"use_dora": True}, ["dora"]),
    (LORA | {"vera_d": 0.1}, ["vera"]),
    (LORA | {"vera_d": 0.1, "use_dora": True}, ["dvora"]),
]


@pytest.mark.parametrize(("config", "names"), METHODS)
def test_methods_are_named_as_in_adapters(config, names):
    assert [method.name for method in parsed(config).methods] == names


@pytest.mark.parametrize("name", sorted(adapters.ADAPTER_CONFIG_MAP))
def test_strings_and_dictionaries_parse_to_the_same_methods(name):
    """But for strings that stand for a union, which keep their name."""
    config = adapters.ADAPTER_CONFIG_MAP[name]
    if isinstance(config, adapters.ConfigUnion):
        return
    (text,), (full,) = parsed(name).methods, parsed(config.to_dict()).methods
    assert (text.name, text.is_pema, text.is_weight_space) == (full.name, full.is_pema, full.is_weight_space)
    assert text.is_invertible == full.is_invertible == ("inv" in name)


@pytest.mark.parametrize("config", [INVERTIBLE, union(PEMA, INVERTIBLE), "pema|seq_bn_inv", "seq_bn[inv_adapter='glow']",
                                    {"invertible_adapter": {"block_type": "nice", "reduction_factor": 2}}])  # fmt: skip
def test_invertible_adapters_are_recognized_in_every_spelling(config):
    assert any(method.is_invertible for method in parsed(config).methods)
    assert not any(method.is_invertible for method in parsed(union(PEMA, BOTTLENECK, LORA)).methods)


def test_frozen_rows_are_not_trained_rows():
    for config in (PEMA | {"trainable": False}, union(LORA, PEMA | {"trainable": False}), "pema[trainable=False]"):
        assert parsed(config).has_pema and not parsed(config).trains_rows
    assert parsed("pema").trains_rows and not parsed(LORA).has_pema


WITHOUT = [
    (PEMA, None),
    ("pema", None),
    (LORA, LORA),
    (union(PEMA, LORA), LORA),
    (union("pema", "lora"), "lora"),
    ("pema|lora[r=4]", "lora[r=4]"),
    ("pema|lora|seq_bn", "lora|seq_bn"),
    (union(PEMA, LORA, BOTTLENECK) | {"more": 1}, union(LORA, BOTTLENECK) | {"more": 1}),
]


@pytest.mark.parametrize(("config", "left"), WITHOUT)
def test_dropping_pema_leaves_the_other_methods(config, left):
    found = parsed(config).without(lambda method: method.is_pema)
    if left is None:
        assert found is None
    else:
        assert found.content == {"name": "task", "config": left, "model_type": "bert"}
        assert AdapterConfig.parse(json.loads(json.dumps(found.content)), PATH) == found


NAMES = [
    (None, "expected the name of the adapter, found null; save the adapter again"),
    (7, "expected the name of the adapter, found 7"),
    (["task"], r'found \["task"\]'),
    *((name, "cannot be the name of a folder") for name in ("", "/etc", "../up", "a/b", "a\\b", "..", "\0", "x" * 256)),
    ("\ud800", r"adapter name '\\ud800' cannot be the name of a folder"),
]


@pytest.mark.parametrize(("name", "text"), NAMES)
def test_invalid_names_are_refused(name, text):
    refused({"name": name, "config": PEMA}, text)
    if name is None:
        refused({"config": PEMA}, text)


CONFIGS = [
    (None, "config holds null; expected a method, or a union of methods"),
    (3, "config holds 3"),
    ([PEMA], "config holds"),
    ({"architecture": 3}, "config holds"),
    ({"architecture": "union"}, '"configs" of the union is null; expected a list'),
    ({"architecture": "union", "configs": 3}, "of the union is 3; expected a list"),
    ({"configs": {"a": 1}}, r'of the union is {"a": 1}; expected a list'),
    (union(), r"of the union is \[\]; expected a list"),
    (union(PEMA, 3), "config holds 3"),
    (union(PEMA, union(LORA)), "config holds"),
    ("", 'config holds ""; expected a method such as "lora"'),
    ("pema|", 'config holds ""'),
    ("lora[r=]", "config holds"),
    ("lora[r=__import__('os')]", "config holds"),
    ("lora[{1: 2}: 3]", "config holds"),
]


@pytest.mark.parametrize(("config", "text"), CONFIGS)
def test_invalid_configs_are_refused(config, text):
    refused({"name": "task", "config": config}, text)
    if config is None:
        refused({"name": "task"}, text)


def test_the_config_that_adapters_saves_for_pema_is_parsed():
    (method,) = parsed(pema_adapters.PEMAConfig(trainable=False).to_dict()).methods
    assert method.is_pema and not method.trains_rows
