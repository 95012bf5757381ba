"""Fixtures for the tests of the commands."""

import logging

import datasets
import pytest
import transformers
from huggingface_hub import constants


@pytest.fixture
def settings_as_they_were(tmp_path, monkeypatch):
    """pema-scan silences the libraries for the rest of its process, and remembers in HF_HOME, here a folder `hf`."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # of the processes that a test starts
    hub, hub_level = logging.getLogger("huggingface_hub"), logging.getLogger("huggingface_hub").level
    levels = datasets.utils.logging.get_verbosity(), transformers.logging.get_verbosity()
    yield
    hub.setLevel(hub_level)
    datasets.enable_progress_bars()
    datasets.utils.logging.set_verbosity(levels[0])
    transformers.logging.set_verbosity(levels[1])
