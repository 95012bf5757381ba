"""Training runs of the recipes; importing it puts the harness of tools/ on the path."""

import sys
from pathlib import Path

_TOOLS = str(Path(__file__).resolve().parents[2] / "tools")
if _TOOLS not in sys.path:
    sys.path.append(_TOOLS)

from harness.command_line import make_parser  # noqa: E402
from harness.results import write_results  # noqa: E402
from harness.tables import format_table  # noqa: E402
from harness.timing import format_ratio  # noqa: E402
from runs.libraries import silence_libraries  # noqa: E402

__all__ = ["format_ratio", "format_table", "make_parser", "silence_libraries", "write_results"]
