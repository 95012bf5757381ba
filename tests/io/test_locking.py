"""Locks on folders: between processes, within one, and on systems without fcntl."""

import errno
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from pema_adapters.errors import MergeError
from pema_adapters.io import locking
from pema_adapters.io.locking import hold_lock, lock_exclusive, lock_shared

HOLD = """
import sys
from pathlib import Path
from pema_adapters.io.locking import hold_lock
with hold_lock(Path(sys.argv[1]), sys.argv[2] == "exclusive", "is in use"):
    print("locked", flush=True)
    sys.stdin.read()
"""
WITHOUT_FCNTL = """
import sys
sys.modules["fcntl"] = None
from pathlib import Path
from pema_adapters.io import locking
assert not locking.IS_AVAILABLE
with locking.hold_lock(Path(sys.argv[1]), True, "is in use"), locking.hold_lock(Path(sys.argv[1]), True, "is in use"):
    assert not locking.lock_exclusive(0)
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds a lock on `tmp_path` until its standard input ends."""
    with ExitStack() as processes:

        def start(kind):
            command = [sys.executable, "-c", HOLD, str(tmp_path), kind]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            processes.enter_context(process)
            processes.callback(process.kill)
            assert process.stdout.readline() == b"locked\n"
            return process

        yield start


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("shared", "shared", True),
        ("shared", "exclusive", False),
        ("exclusive", "shared", False),
        ("exclusive", "exclusive", False),
    ],
)
def test_locks_exclude_other_processes(hold, tmp_path, first, second, both):
    process = hold(first)
    if both:
        with hold_lock(tmp_path, second == "exclusive", "is in use"):
            pass
    else:
        with pytest.raises(MergeError) as refused, hold_lock(tmp_path, second == "exclusive", "is in use; wait"):
            pytest.fail("locked twice")
        assert str(refused.value) == f"{tmp_path}: is in use; wait"
    process.communicate()
    with hold_lock(tmp_path, True, "is in use"):
        pass


def test_a_killed_process_leaves_no_lock(hold, tmp_path):
    process = hold("exclusive")
    process.kill()
    process.wait()
    with hold_lock(tmp_path, True, "is in use"):
        pass


def test_an_error_in_the_block_releases_the_lock(tmp_path):
    with pytest.raises(KeyError), hold_lock(tmp_path, True, "is in use"):
        raise KeyError
    with hold_lock(tmp_path, True, "is in use"):
        pass


def test_locks_exclude_other_descriptors_of_the_same_process(tmp_path):
    one, other = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    try:
        assert lock_shared(one)
        assert lock_shared(other)
        with pytest.raises(BlockingIOError):
            lock_exclusive(one)
        os.close(other)
        assert lock_exclusive(one)
    finally:
        os.close(one)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_locks_nothing(tmp_path, monkeypatch, code):
    def refuse(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locking.fcntl, "flock", refuse)
    with hold_lock(tmp_path, True, "is in use"), hold_lock(tmp_path, True, "is in use"):
        pass


def test_other_system_errors_are_raised(tmp_path):
    with pytest.raises(FileNotFoundError), hold_lock(tmp_path / "nowhere", False, "is in use"):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock_shared(10**6)


def test_without_fcntl_there_are_no_locks(tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT_FCNTL, str(tmp_path)], check=True)
