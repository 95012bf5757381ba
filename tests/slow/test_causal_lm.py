"""recipes/causal_lm.py trains, merges, and finds the merged model's loss equal; with LoRA and in full."""

import re
import subprocess
import sys

import pytest

from tests.recipes.conftest import RECIPES


@pytest.mark.parametrize("way", [[], ["--full"], ["--train-on-prompts"]], ids=str)
def test_the_demo(tmp_path, way):
    command = [RECIPES / "causal_lm.py", "--demo", "--length", "128", "--max-steps", "20", "--output", tmp_path, *way]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.search(r"blocks: ([\d.]+) before, ([\d.]+) after 20 steps", done.stdout).groups())
    assert after < before
    assert re.search(r"\d{3} blocks of 128 tokens use PartialVocabulary\([\d,]+ of 30,522 rows", done.stdout)
    assert f"the merged checkpoint, loaded with Transformers alone: {after:.4f}" in done.stdout
    assert "and 31.3 MB of logits for a batch of 1 x 128 tokens" in done.stdout
