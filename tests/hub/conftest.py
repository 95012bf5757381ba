"""Fixtures: bases and deltas to download."""

from tests.merging.conftest import make_adapter, make_base  # noqa: F401
