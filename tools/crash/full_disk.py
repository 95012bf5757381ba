"""Merges onto a disk that is full, or becomes full."""

import contextlib
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from crash.kill_modes import MODES, Place, Reference, arguments, contents, run
from harness.checkpoints import MERGE


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path | None]:
    """Mount a file system of that size in memory; yields None where this process may not."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
                             capture_output=True, check=False).returncode == 0  # fmt: skip
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=False)


def _check_failure(done: "subprocess.CompletedProcess[str]", out: Path, text: str) -> str:
    """Return what is wrong with a run that had to fail with this text and leave nothing behind."""
    if done.returncode != 1 or done.stderr.count("\n") != 1 or text not in done.stderr:
        return f"exit code {done.returncode}, {done.stderr.strip()!r}; expected 1 and {text!r}"
    left = [path.name for path in out.parent.iterdir() if path.name.lstrip(".").startswith(out.name)]
    return f"left behind: {', '.join(left)}" if left else ""


def full_on_the_way(place: Place, disk: Path, reference: Reference) -> str:
    """Fill the disk once the merge has begun to write, and free it for the next run."""
    out, filler = disk / "out", disk / "filler"
    command = arguments(place.root / "base", place.root / "delta", out)
    process = subprocess.Popen([*MERGE, *command], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(disk.glob(".out.*")):
        time.sleep(0.0002)
    process.send_signal(signal.SIGSTOP)  # on a slow machine it might be done before the disk is full
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 20)):
            pass
    process.send_signal(signal.SIGCONT)
    wrong = _check_failure(_wait(process), out, "No space left on device")
    filler.unlink()
    again = run(command)
    is_right = again.returncode == 0 and contents(out) == reference.target
    return wrong or ("" if is_right else f"the next run is wrong: {again.stderr.strip()}")


def _wait(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    _, error = process.communicate()
    return subprocess.CompletedProcess([], process.returncode, "", error)


def full_from_the_start(place: Place, disk: Path) -> str:
    out = disk / "out"
    (disk / "filler").write_bytes(bytes(3 << 20))
    return _check_failure(run(arguments(place.root / "base", place.root / "delta", out)), out, "bytes free")


def merge_with_limit(place: Place) -> str:
    """Merge where no file may become longer than 1 MB."""
    place.fresh()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [*MERGE, *MODES["fresh"].arguments(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    return _check_failure(done, place.target, "File too large")


def full_disks(place: Place, reference: Reference, megabytes: int) -> dict[str, str]:
    """Return `{disk: what is wrong, or ""}`."""
    found = {"files limited to 1 MB": merge_with_limit(place)}
    runs: dict[str, tuple[float, Callable[[Path], str]]] = {
        "full on the way": (1.5, lambda disk: full_on_the_way(place, disk, reference)),
        "full from the start": (0.5, lambda disk: full_from_the_start(place, disk)),
    }
    for number, (name, (share, fill)) in enumerate(runs.items()):
        with small_disk(place.root / f"disk{number}", int(megabytes * share) + 4) as disk:
            found[name] = fill(disk) if disk else "not run: this process may not mount a file system"
    return found
