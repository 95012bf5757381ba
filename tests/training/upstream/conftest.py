"""A failure of the contract names the versions that broke it."""

from importlib import metadata

import pytest

from tests.paths import REPOSITORY

PINNED = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line)


def describe(package):
    return f"{package}: found {metadata.version(package)}, the contract was written for {PINNED[package]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and item.path.name == "test_contract.py":
        report.sections.append(("versions", "\n".join(map(describe, ("adapters", "transformers")))))
    return report
