"""A push of a merged model takes no merged copy on the disk, and little memory; beside the usual ways.

    python tools/bench_push.py [--size GB] [--dir FOLDER] [--rounds 3] [--json FILE]

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

from _bench import anonymous_bytes, parser, table, write_json
from _merge_shapes import MERGE, POLL_SECONDS, Shape, write_base, write_delta

ROOT = Path(__file__).resolve().parents[1]
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
    """What a process has caused to be written to disks so far; sockets do not count."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), 0)


def pushed(command: list[str], home: Path) -> Cost:
    """Push to a Hub of its own."""
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


def commands(folder: Path) -> dict[str, list[str]]:
    base, output = str(folder / "base"), str(folder / "copy")
    push = [*MERGE, "--base", base, "--delta", str(folder / "delta"), "--push-to-hub", REPOSITORY, "--quiet"]
    return {
        "pema-merge --push-to-hub": push,
        "pema-merge --push-to-hub --output": [*push, "--output", output],
        "Transformers' push_to_hub": [sys.executable, "-c", TRANSFORMERS, base, REPOSITORY],
    }


def measure(folder: Path, rounds: int) -> dict[str, list[Cost]]:
    found: dict[str, list[Cost]] = {name: [] for name in commands(folder)}
    for _ in range(rounds):
        for name, command in commands(folder).items():
            found[name].append(pushed(command, folder / "home"))
            shutil.rmtree(folder / "copy", ignore_errors=True)
    return found


def _shown(costs: list[Cost]) -> list[str]:
    seconds = statistics.median(cost.seconds for cost in costs)
    anonymous, written = max(cost.anonymous for cost in costs), max(cost.written for cost in costs)
    return [f"{seconds:.1f}", f"{anonymous / 1e6:.0f}", f"{written / 1e6:,.0f}"]


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--size", type=float, default=1.0, metavar="GB", help="of the checkpoint (default 1)")
    options.add_argument("--dir", type=Path, help="work in a fresh folder below this one (default: the system's)")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.dir) as name:
        folder, shape = Path(name), Shape.of(chosen.size * 1e9)
        write_base(folder / "base", shape)
        write_delta(folder / "delta", folder / "base", shape, shape.rows // ONE_ROW_IN, lora=True)
        found = measure(folder, chosen.rounds)
    rows = [[name, *_shown(costs)] for name, costs in found.items()]
    print(table([f"{chosen.size:g} GB", "s (median)", "anonymous MB", "written to disk MB"], rows))
    write_json(chosen.json, {name: [vars(cost) for cost in costs] for name, costs in found.items()})


if __name__ == "__main__":
    main()
