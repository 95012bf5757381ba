"""A user who is logged in, a base on the Hub, and a delta trained on it."""

from pathlib import Path

import pytest
from adapters import ConfigUnion, LoRAConfig

from pema_adapters import PEMAConfig
from tests.publishing.repositories import BASE, BASE_CARD, trained


@pytest.fixture
def account(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    return hub


@pytest.fixture
def base(account, case):
    """A base on the Hub."""
    Path(case.folder, "README.md").write_text(BASE_CARD)
    account.publish(BASE, case.folder)
    return case


@pytest.fixture
def delta(base, tmp_path):
    """PEMA and LoRA, trained on the Hub's base; saved here."""
    trained(BASE, ConfigUnion(PEMAConfig(), LoRAConfig(r=2))).save_adapter(
        str(tmp_path / "run"), "task", use_safetensors=True
    )
    return tmp_path / "run"
