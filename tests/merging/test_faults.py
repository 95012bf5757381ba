"""Some of the faults of tools/fault_merge.py; the tool itself goes over thousands."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.paths import TOOLS

TOOL = TOOLS / "fault_merge.py"
FAULTS = (
    "fresh:open:30:EMFILE", "fresh:pwrite:9:ENOSPC", "fresh:pwrite:9:short", "fresh:fsync:5:EIO", "fresh:rename:1:EIO",
    "fresh:copy:3:EXDEV+", "fresh:disk:40:ENOSPC+", "fresh:any:200:SIGINT", "fresh:any:200:replace-base",
    "fresh:any:250:cut-delta", "fresh:any:250:SIGTERM", "in-place:pwrite:9:EIO", "in-place:write:3:ENOSPC",
    "in-place:fsync:8:EIO", "in-place:any:300:SIGINT", "in-place:any:200:rewrite-base", "undo:pwrite:9:EIO",
    "undo:any:100:SIGINT",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="takes a C compiler on Linux"
)


def disturb(folder, *faults, python_path=""):
    """`{fault: what became of it}`."""
    command = [sys.executable, TOOL, "--jobs", "1", "--dir", folder, "--json", folder / "found.json", "--only", *faults]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": python_path}, capture_output=True, text=True, check=False
    )
    assert (folder / "found.json").exists(), done.stderr
    found = {one["fault"]: one for one in json.loads((folder / "found.json").read_text())["figures"]["faults"]}
    assert set(found) == set(faults)
    assert done.returncode == int(any(one["wrong"] for one in found.values()))
    return found


@pytest.mark.slow
def test_faults(tmp_path):
    found = disturb(tmp_path, *FAULTS)
    assert {fault: one["wrong"] for fault, one in found.items() if one["wrong"]} == {}
    assert [fault for fault, one in found.items() if one["outcome"] == "not met"] == []
    assert {"refused", "completed"} <= {one["outcome"] for one in found.values()}


@pytest.mark.slow
def test_a_lost_write_is_found(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import os
        def pwrite(fd, data, at, real=os.pwrite):
            try:
                return real(fd, data, at)
            except OSError:
                return len(data)
        os.pwrite = pwrite
        """)
    )
    found = disturb(tmp_path, "fresh:pwrite:9:ENOSPC", python_path=str(tmp_path))
    assert found["fresh:pwrite:9:ENOSPC"]["wrong"][0].startswith("succeeds, but differs in work/out/model-0000")
