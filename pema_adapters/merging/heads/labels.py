"""The labels of a head, as head_config.json has them and as config.json says them."""

from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError

MAX_LABELS = 1_000_000
"""Every one is a line of config.json, twice."""


def read_labels(head: dict[str, Any], path: Path) -> dict[str, int]:
    """Read `{label: number}`, in the order of the numbers: "LABEL_0", ... for `num_labels` alone, {} for neither.

    `path` is where `head` was read. Raises `FormatError` where there are more than MOST_LABELS.
    """
    found, count = head.get("label2id"), head.get("num_labels")
    if isinstance(found, dict) and found and all(isinstance(number, int) for number in found.values()):
        return dict(sorted(found.items(), key=lambda item: item[1]))
    if isinstance(count, int) and count > MAX_LABELS:
        raise FormatError(
            f"{path}: num_labels is {str(count)[:40]}, expected at most {MAX_LABELS}; the file is damaged"
        )
    return {f"LABEL_{i}": i for i in range(count)} if isinstance(count, int) else {}


def label_settings(found: dict[str, int]) -> dict[str, Any]:
    """Make the settings of config.json: None (no setting) for {} and for Transformers' default, two without names."""
    if not found or found == {"LABEL_0": 0, "LABEL_1": 1}:
        return {"id2label": None, "label2id": None}
    return {"id2label": {str(number): label for label, number in found.items()}, "label2id": found}
