"""load_model refuses a base whose config.json has Transformers run a kernel from the Hub (CVE-2026-4372)."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from pema_adapters import PartialVocabulary, load_model
from pema_adapters.errors import FormatError
from tests.models import MIXED, USED, V, assert_same, outputs

KERNEL = "org/kernel"
VOCABULARY = PartialVocabulary(USED, V)
FIELDS = {
    "internal": {"_attn_implementation_internal": KERNEL},
    "private": {"_attn_implementation": KERNEL},
    "revision": {"_attn_implementation_internal": f"{KERNEL}@main:attend"},
    "by part": {"_attn_implementation": {"": "sdpa", "text_config": KERNEL}},
    "within": {"text_config": {"attn_implementation": KERNEL}},
}


def change(case, fields):
    path = Path(case.folder, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def requested(monkeypatch):
    """The kernels that Transformers tries to load."""
    found = []
    monkeypatch.setattr("transformers.modeling_utils.load_and_register_kernel", found.append)
    return found


@pytest.mark.parametrize("fields", FIELDS)
def test_a_kernel_in_the_base_config_is_refused_before_it_is_loaded(case, requested, fields):
    change(case, FIELDS[fields])
    with pytest.raises(
        FormatError, match=rf"config\.json: _?attn_implementation\w* names '{KERNEL}.*CVE-2026-4372.*; remove"
    ):
        load_model(case.auto_class, case.folder, VOCABULARY)
    assert requested == []


def test_a_kernel_in_a_given_config_is_refused(case, requested):
    change(case, FIELDS["internal"])
    config = AutoConfig.from_pretrained(case.folder)
    with pytest.raises(FormatError, match=f"config: _attn_implementation_internal names '{KERNEL}'"):
        load_model(case.auto_class, case.folder, VOCABULARY, config=config)
    assert requested == []


def test_transformers_itself_would_load_the_kernel(case, requested):
    change(case, FIELDS["internal"])
    with pytest.raises(KeyError, match=KERNEL):  # as none was registered here
        case.plain()
    assert set(requested) == {KERNEL}


@pytest.mark.parametrize("fields", [{"_attn_implementation_internal": "eager"}, {"_attn_implementation_autoset": True}])
def test_configs_without_a_kernel_are_accepted(case, fields):
    expected = outputs(case.plain(), MIXED)
    change(case, fields)
    torch_outputs = outputs(load_model(case.auto_class, case.folder, VOCABULARY, attn_implementation="sdpa"), MIXED)
    assert_same(torch_outputs, expected)
