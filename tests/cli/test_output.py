"""The commands with an ASCII, full or closed standard output; --version; python -m pema_adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.merging.conftest import T, make_adapter, make_base, noise, read  # noqa: F401 - fixtures

MERGE = [sys.executable, "-m", "pema_adapters", "merge"]
SCAN = [sys.executable, "-m", "pema_adapters", "scan"]
NAME = "\N{GREEK SMALL LETTER ALPHA}\N{LATIN SMALL LETTER E WITH ACUTE}"


@pytest.fixture
def pair(make_base, make_adapter):  # noqa: F811
    """A base, and an adapter with a name outside ASCII that stays one beside the output."""
    base = make_base()
    rest = {f"bert.encoder.layer.0.adapters.{NAME}.down": T.of(noise(1, 4))}
    return base, make_adapter(base, rest=rest, name=NAME)


def call(pair, *more, command=MERGE, **options):
    arguments = ["--base", str(pair[0].folder), "--delta", str(pair[1].folder), *more]
    environment = {**os.environ, **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([*command, *arguments], env=environment, check=False, **options)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_encoding_lacks_are_escaped(pair, encoding):
    done = call(pair, env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, b"")
    shown = "\\u03b1" + ("\\xe9" if encoding == "ascii" else "\xe9")
    assert f'/adapters/{shown}", set_active=True' in done.stdout.decode(encoding)
    found = call(pair, "--json", "--overwrite", env={"PYTHONIOENCODING": encoding})
    assert json.loads(found.stdout)["adapters_left"] == [NAME]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_disk_behind_standard_output_is_reported(pair, more):
    with Path("/dev/full").open("w") as full:
        done = call(pair, *more, stdout=full)
    assert done.returncode == 0
    assert done.stderr == (
        b"pema-merge: error: standard output cannot be written (No space left on device); all else is done\n"
    )
    assert len(read(pair[1].folder / "merged")) == len(pair[0].tensors)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_dry_run_that_cannot_be_printed_fails(pair):
    with Path("/dev/full").open("w") as full:
        done = call(pair, "--dry-run", stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"pema-merge: error: standard output cannot be written (No space left on device)\n"


def test_a_closed_pipe_is_no_failure(pair):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = call(pair, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (pair[1].folder / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_closed_descriptors_are_no_failure(pair, closed):
    done = call(pair, command=["sh", "-c", f'exec "$0" "$@" {closed}', *MERGE])
    assert done.returncode == 0, done
    assert read(pair[1].folder / "merged")


@pytest.mark.parametrize(
    ("command", "name"), [(MERGE, "pema-merge"), (SCAN, "pema-scan"), (MERGE[:3], "python -m pema_adapters")]
)
def test_version_is_one_line(command, name):
    import numpy
    import safetensors

    import pema_adapters

    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    python = ".".join(map(str, sys.version_info[:3]))
    versions = f"Python {python}, numpy {numpy.__version__}, safetensors {safetensors.__version__}"
    assert (done.stdout, done.stderr) == (f"{name} {pema_adapters.__version__} ({versions})\n", "")


def test_the_module_refuses_other_commands():
    done = subprocess.run([*MERGE[:3], "mergee"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid choice: 'mergee' (choose from" in done.stderr
    assert subprocess.run([*MERGE, "--help"], capture_output=True, text=True, check=True).stdout.startswith(
        "usage: pema-merge"
    )


def test_text_from_files_cannot_forge_lines(make_base, make_adapter, capsys):  # noqa: F811
    from pema_adapters.cli.merge import main

    base = make_base()
    folder = make_adapter(base, rest={"bert.encoder.layer.0.adapters.task.down": T.of(noise(1, 4))}).folder
    evil = folder.with_name('run"); evil("\x1b[2J\n  verified: every byte')
    folder.rename(evil)
    assert main(["--base", str(base.folder), "--delta", str(evil)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(line.startswith("  verified") for line in out.splitlines())
    line = next(line for line in out.splitlines() if "from_pretrained(" in line)
    seen = []
    scope = {"transformers": _Recorder(seen), "adapters": _Recorder([])}
    exec(line.strip(), scope)
    assert seen == [str(evil / "merged")]


class _Recorder:
    """Stands for a module: remembers what any of its functions is called with."""

    def __init__(self, seen):
        self._seen = seen

    def __getattr__(self, name):
        return self

    def __call__(self, *given):
        self._seen += given
        return self
