"""Tests of minutes rather than seconds: whole recipes, README's commands, several processes. `make test-all` runs them."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
