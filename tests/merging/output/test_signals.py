"""SIGTERM ends pema-merge as Ctrl-C does: nothing is left, and one line says so."""

import subprocess
import sys

import pytest

from tests.merging.in_place.plans import content

STOPPED = """
import os, signal, sys
from pema_adapters.cli.merge import main
from {package} import {module}
original = {module}.{name}
def stop(*args, **kwargs):
    found = original(*args, **kwargs)
    os.kill(os.getpid(), signal.{number})
    return found
{module}.{name} = stop
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments, **where):
    code = STOPPED.format(**where)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize(("number", "word"), [("SIGTERM", "terminated"), ("SIGINT", "interrupted")])
def test_a_merge_that_is_stopped_leaves_nothing_behind(make_base, make_adapter, tmp_path, number, word):
    base = make_base()
    delta = make_adapter(base).folder
    where = {"package": "pema_adapters.merging", "module": "api", "name": "write_plan", "number": number}
    done = run("--base", base.folder, "--delta", delta, "--output", tmp_path / "out", **where)
    assert (done.returncode, done.stderr) == (1, f"pema-merge: {word}; nothing was left behind\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_merge_in_place_that_is_stopped_is_rolled_back(make_base, make_adapter, number):
    base = make_base()
    delta, before = make_adapter(base).folder, content(base.folder)
    where = {
        "package": "pema_adapters.merging.in_place",
        "module": "execute",
        "name": "_apply_changes",
        "number": number,
    }
    done = run("--base", base.folder, "--delta", delta, "--in-place", **where)
    assert done.returncode == 1
    assert done.stderr.endswith("base is as it was\n")
    assert content(base.folder) == before
