"""A base to merge into, and what the same plan writes into a new folder."""

import numpy as np
import pytest

from pema_adapters.merging.output.writer import write_plan
from tests.merging.in_place.plans import CONFIG, README, A, B, content, plan_for


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for name, size in ((A, 20 + 32 * 8 + 5), (B, 64)):
        (folder / name).write_bytes(np.random.default_rng(size).bytes(size))
    (folder / CONFIG).write_text("{}")
    (folder / CONFIG).chmod(0o640)
    (folder / README).write_text("hello")
    return folder


@pytest.fixture
def merged(base, tmp_path):
    (tmp_path / "written").mkdir()
    write_plan(plan_for(base), tmp_path / "written", lambda count: None)
    return content(tmp_path / "written")
