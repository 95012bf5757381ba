"""Time, memory and disk of pushing a merged model, beside the usual ways.

    python tools/bench_push.py [--size GB] [--dir FOLDER] [--rounds 3] [--json FILE] [--save]

`pema-merge --push-to-hub` from the plan, then with `--output` (a copy on the disk as well), and `push_to_hub` of
Transformers (of the base alone: what it costs to push without merging anything). The Hub is a server on this machine
that hashes what it gets and throws it away. Anonymous memory is RssAnon at its peak, disk what the process wrote.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoints import MERGE, POLL_SECONDS, Shape, write_base, write_delta
from harness.child import anonymous_bytes
from harness.command_line import add_dir, make_parser
from harness.results import ROOT, write_results
from harness.tables import format_table
from harness.timing import format_ratio

REPOSITORY, TOKEN = "someone/merged", "hf_good"
ONE_ROW_IN = 15
SERVER = """
import sys, tempfile
from pathlib import Path
from tests.hub.server import Hub
with tempfile.TemporaryDirectory() as folder, Hub(Path(folder), keep_lfs=False) as hub:
    print(hub.url, flush=True)
    sys.stdin.read()
"""
TRANSFORMERS = """
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2])
"""


@dataclass(frozen=True)
class Cost:
    """Of one push: seconds, peak of anonymous memory in bytes, bytes written to the disk."""

    seconds: float
    anonymous: int
    written: int


def written_bytes(pid: int) -> int:
    """Return the bytes that a process has written to disks so far; sockets do not count."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), 0)


def push(command: list[str], home: Path) -> Cost:
    """Run one push, to a Hub of its own."""
    with subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as server:  # fmt: skip
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        start = time.perf_counter()
        process = subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True)
        anonymous = written = 0
        while process.poll() is None:
            anonymous, written = max(anonymous, anonymous_bytes(process.pid)), max(written, written_bytes(process.pid))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - start
        server.communicate("")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[-200:]} failed:\n{process.stderr and process.stderr.read()[-2000:]}")
    return Cost(seconds, anonymous, written)


def push_commands(folder: Path) -> dict[str, list[str]]:
    base, output = str(folder / "base"), str(folder / "copy")
    push = [*MERGE, "--base", base, "--delta", str(folder / "delta"), "--push-to-hub", REPOSITORY, "--quiet"]
    return {
        "pema-merge --push-to-hub": push,
        "pema-merge --push-to-hub --output": [*push, "--output", output],
        "Transformers' push_to_hub": [sys.executable, "-c", TRANSFORMERS, base, REPOSITORY],
    }


def measure(folder: Path, rounds: int) -> dict[str, list[Cost]]:
    found: dict[str, list[Cost]] = {name: [] for name in push_commands(folder)}
    for _ in range(rounds):
        for name, command in push_commands(folder).items():
            found[name].append(push(command, folder / "home"))
            shutil.rmtree(folder / "copy", ignore_errors=True)
    return found


def render(figures: dict[str, Any]) -> str:
    rows, plan = [], next(iter(figures["pushes"].values()))
    for name, costs in figures["pushes"].items():
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(costs, plan, strict=True)]
        anonymous, written = (max(cost[key] for cost in costs) for key in ("anonymous", "written"))
        rows.append([name, f"{statistics.median(cost['seconds'] for cost in costs):.1f}", format_ratio(ratios),
                     f"{anonymous / 1e6:.0f}", f"{written / 1e6:,.0f}"])  # fmt: skip
    header = [f"{figures['size_gb']:g} GB", "median s", "/ the first, median (range)", "anonymous MB", "disk MB"]
    return format_table(header, rows)


def main() -> None:
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--size", type=float, default=1.0, metavar="GB", help="of the checkpoint (default 1)")
    add_dir(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder, shape = Path(name), Shape.of(options.size * 1e9)
        write_base(folder / "base", shape)
        write_delta(folder / "delta", folder / "base", shape, shape.rows // ONE_ROW_IN, lora=True)
        found = measure(folder, options.rounds)
    pushes = {name: [vars(cost) for cost in costs] for name, costs in found.items()}
    figures = {"size_gb": options.size, "pushes": pushes}
    print(render(figures))
    write_results(options, figures)


if __name__ == "__main__":
    main()
