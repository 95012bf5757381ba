import pytest

from pema_adapters.formats.tensor_names import canonicalize, map_canonical_names


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("bert.embeddings.LayerNorm.gamma", "bert", "embeddings.LayerNorm.weight"),
        ("embeddings.LayerNorm.beta", "bert", "embeddings.LayerNorm.bias"),
        ("bertha.x", "bert", "bertha.x"),
        ("bert.x", "", "bert.x"),
        ("bert.bert.x", "bert", "bert.x"),
        ("gamma", "bert", "gamma"),
    ],
)
def test_canonical_names(name, prefix, expected):
    assert canonicalize(name, prefix) == expected


def test_the_prefixed_name_is_preferred():
    assert map_canonical_names(["x", "bert.x", "y"], "bert") == {"x": "bert.x", "y": "y"}
    assert map_canonical_names(["bert.x", "x"], "bert") == {"x": "bert.x"}
