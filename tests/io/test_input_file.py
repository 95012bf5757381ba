"""Input files held open: changes are detected, and few descriptors are needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pema_adapters.errors import FormatError, InputChangedError
from pema_adapters.io.input_file import InputFile


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def rewrite(path):
    path.write_bytes(bytes(path.stat().st_size))


def rename_over(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def cut(path):
    os.truncate(path, 100)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def rewrite_with_old_times(path):
    before = path.stat()
    rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [rewrite, rename_over, cut, grow, rewrite_with_old_times])
def test_every_change_is_detected_and_named(path, change):
    file = InputFile(path)
    file.check()
    change(path)
    for use in (file.check, lambda: file.view(0, 10)):
        with pytest.raises(InputChangedError, match=f"{path}: changed while it was in use"):
            use()


@pytest.mark.parametrize("change", [rewrite, cut, grow])
def test_contents_only_still_detects_writes(path, change):
    file = InputFile(path)
    change(path)
    with pytest.raises(InputChangedError):
        file.view(0, 10, contents_only=True)


def test_contents_only_ignores_a_new_name_or_mode(path):
    file = InputFile(path)
    path.chmod(0o600)
    os.link(path, path.with_name("second"))
    path.rename(path.with_name("moved"))
    path.with_name("moved").unlink()
    assert bytes(file.view(3, 6, contents_only=True)) == bytes([3, 4, 5])
    with pytest.raises(InputChangedError, match="it was replaced or renamed, or its links, mode or times were changed"):
        file.check()


def test_a_read_beyond_the_end_is_refused(path):
    file = InputFile(path)
    assert file.read(250, 260) == bytes([250, 251, 252, 253, 254, 255, 0, 1, 2, 3])
    cut(path)
    with pytest.raises(InputChangedError, match="ends at byte 100 now"):
        file.read(50, 150)


def test_empty_files_have_no_bytes(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    assert len(InputFile(path).view(0, 0)) == 0


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing"])
def test_anything_but_a_regular_file_is_refused(tmp_path, kind):
    path = tmp_path / kind
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "missing": lambda: None}[kind]()
    with pytest.raises(FormatError, match=str(path)):
        InputFile(path)


MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pathlib import Path
from pema_adapters.io.input_file import InputFile
files = [InputFile(path) for path in sorted(Path(sys.argv[1]).iterdir())]
assert sum(int(file.view(0, 1)[0]) for file in files) == sum(i % 251 for i in range(300))
files[0].path.write_bytes(b"other")
try:
    files[0].check()
except Exception as error:
    print(type(error).__name__)
"""


def test_many_files_need_few_descriptors_and_are_checked_when_reopened(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:04}").write_bytes(bytes([i % 251]))
    done = subprocess.run([sys.executable, "-c", MANY, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "InputChangedError"


def test_descriptors_are_closed_with_their_objects(path):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    files = [InputFile(path) for _ in range(10)]
    for file in files:
        file.view(0, 1)
    assert count() > before
    del files, file
    assert count() == before
