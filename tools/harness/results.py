"""Result files: what a tool measured, with which command, at which commit, on which machine.

    write_results(options, figures)        # `options` of make_parser: to --json FILE, and to tools/results with --save

A file is JSON: tool, command, commit, dirty, date, machine, versions, figures. `figures` are those of all rounds, and
whatever the tool's `render(figures)` needs for its table. No host names, no paths of the machine.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "results"
RECONSTRUCTED = "reconstructed from"
"""Key of a file that no run wrote: its table stood in a document before there were result files."""
PACKAGES = (
    "pema_adapters", "adapters", "transformers", "torch", "numpy", "safetensors", "tokenizers", "datasets",
    "huggingface_hub", "peft", "bitsandbytes", "transformer-smaller-training-vocab",
)  # fmt: skip


def write_results(options: argparse.Namespace, figures: Mapping[str, Any], name: str | None = None) -> None:
    """Write the result file where the options ask for it.

    Args:
        options: of make_parser: `json`, a path or None; `save`, whether to write to tools/results; `checkout`, that of
            the beginning of the run.
        figures: anything that JSON takes; paths become their names.
        name: of the file in tools/results; default: that of the command.
    """
    tool = Path(sys.argv[0]).stem
    targets = [options.json, RESULTS / f"{name or tool}.json" if options.save else None]
    content = describe_run(tool) | options.checkout | {"figures": figures}
    for path in filter(None, targets):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(_without_paths(content), indent=1) + "\n").encode())


def describe_run(tool: str) -> dict[str, Any]:
    """Return command, date, machine and versions of this run."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        "tool": tool,
        "command": shlex.join(["python", str(shown), *map(_shorten, sys.argv[1:])]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def describe_checkout() -> dict[str, Any]:
    """Return the commit, and whether files other than results and documents differ from it."""
    others = ("--", ".", ":!tools/results", ":!*.md")
    changes = _git("status", "--porcelain", "--untracked-files=no", *others)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(changes)}


def describe_machine() -> dict[str, Any]:
    """Return CPU model, cores, memory, the limit of threads, load and system."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")]
    return {
        "cpu": next(iter(cpu), platform.machine()),
        "cores": os.cpu_count(),
        "memory_bytes": next(iter(memory), None),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read a result file. Raises ValueError where it is none."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not found.keys() & {"figures", RECONSTRUCTED}:
        raise ValueError(f"{path}: no result file: found neither 'figures' nor {RECONSTRUCTED!r}")
    return found


def replace_file(path: Path, content: bytes) -> None:
    """Write beside `path`, sync, rename: a reader sees the old file or the new one, whatever happens."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    """Return what git says; None outside a checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _shorten(argument: str) -> str:
    """Return the name alone of an absolute path."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _without_paths(value: Any) -> Any:
    """Return the value for JSON, with nothing in it that tells where things are on this machine."""
    if isinstance(value, Mapping):
        return {str(key): _without_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_without_paths(part) for part in value]
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str):
        for folder in (ROOT, Path(tempfile.gettempdir()), Path.home()):
            value = value.replace(f"{folder}/", "")
    return value
