"""pema-scan runs Python code of a tokenizer or a config only with --trust-remote-code, and never asks."""

import io
import json

import pytest

from pema_adapters.cli.scan import main
from tests.cli.test_scan_outputs import folder  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("settings_as_they_were")
CODE = "from pathlib import Path\nPath({canary!r}).touch()\n"
CONFIG_CLASS = """
from transformers import PretrainedConfig
class Own(PretrainedConfig):
    model_type = "own"
"""
TOKENIZER_CLASS = """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(folder, monkeypatch):  # noqa: F811
    """A tokenizer and a config that need code of their own, which says that it ran; "y" stands on stdin."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.syspath_prepend(folder / "modules")
    canary = folder / "ran"
    for name, kind in (("configuration_own", CONFIG_CLASS), ("tokenization_own", TOKENIZER_CLASS)):
        (folder / "large" / f"{name}.py").write_text(CODE.format(canary=str(canary)) + kind)
    settings = json.loads((folder / "large" / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (folder / "large" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own").mkdir()
    (folder / "own" / "configuration_own.py").write_text(CODE.format(canary=str(canary)) + CONFIG_CLASS)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}, "vocab_size": 400, "d_model": 8}
    (folder / "own" / "config.json").write_text(json.dumps(config))
    return canary


NEEDS_CODE = {
    "tokenizer": (["--tokenizer", "large"], "large: the tokenizer needs code from its repository, which is not run"),
    "model": (
        ["--tokenizer", "small", "--model", "own"],
        "own: the model config needs code from its repository, which",
    ),
}


@pytest.mark.parametrize("kind", NEEDS_CODE)
def test_code_of_a_repository_is_run_only_on_request(kind, with_code, capsys):
    arguments, message = NEEDS_CODE[kind]
    assert main(["--data", "x.txt", "--no-cache", *arguments]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert "--trust-remote-code" in err
    assert not with_code.exists()
    assert main(["--data", "x.txt", "--no-cache", "--trust-remote-code", *arguments]) == 0
    assert with_code.exists()
