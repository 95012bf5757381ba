"""Whatever happens on the way, nothing that looks finished is left, and the next run succeeds."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import FormatError, MergeError
from pema_adapters.merging import api
from pema_adapters.merging.output import staging, writer
from tests.merging.conftest import oracle, read


@pytest.fixture
def pair(make_base, make_adapter):
    base = make_base(shards=2)
    return base, make_adapter(base)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def succeeds(pair, out):
    base, delta = pair
    merge_checkpoint(base.folder, delta.folder, out, verify=True)
    assert read(out) == oracle(base, delta)
    assert names(out.parent) == ["base", "out", "run"]


def test_rename_fails(pair, tmp_path, monkeypatch):
    def replace(self, other):
        raise OSError(errno.EACCES, "Permission denied")

    base, delta = pair
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(MergeError, match=r"out: cannot be put in place \(Permission denied\)"):
            merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    assert names(tmp_path) == ["base", "run"]
    succeeds(pair, tmp_path / "out")


def test_rename_fails_while_replacing(pair, tmp_path, monkeypatch):
    base, delta = pair
    out = tmp_path / "out"
    succeeds(pair, out)
    original = Path.replace

    def replace(self, other):
        if "partial" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return original(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(MergeError, match="cannot be put in place"):
        merge_checkpoint(base.folder, delta.folder, out, overwrite=True)
    assert read(out) == oracle(base, delta)
    assert names(tmp_path) == ["base", "out", "run"]


@pytest.mark.parametrize("where", ["copy_file_range", "pwrite", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_the_disk_fills_up_or_the_user_gives_up(pair, tmp_path, monkeypatch, where, error):
    calls = []
    original = getattr(os, where)

    def fail(*args):
        calls.append(args)
        if len(calls) > 2:
            raise error
        return original(*args)

    base, delta = pair
    with monkeypatch.context() as patch:
        patch.setattr(os, where, fail)
        with pytest.raises((MergeError, KeyboardInterrupt)) as raised:
            merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    if isinstance(error, OSError):
        assert "No space left on device; nothing was left behind" in str(raised.value)
    assert names(tmp_path) == ["base", "run"]
    succeeds(pair, tmp_path / "out")


def test_file_size_limit(pair, tmp_path):
    base, delta = pair
    code = f"""
        import resource, signal, sys
        from pema_adapters.cli.merge import main
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        sys.exit(main(["--base", {str(base.folder)!r}, "--delta", {str(delta.folder)!r}, "--output", {str(tmp_path / "out")!r}]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large; nothing was left behind" in done.stderr
    assert names(tmp_path) == ["base", "run"]


def test_killed_in_the_middle(pair, tmp_path):
    """The staging folder of a killed merge stays, hidden; the next merge takes it over."""
    base, delta = pair
    code = f"""
        import time
        from pema_adapters.merging import api
        from pema_adapters.merging.output import staging
        def stop(*args):
            print("written", flush=True)
            time.sleep(60)
        staging._commit = stop
        api.merge_checkpoint({str(base.folder)!r}, {str(delta.folder)!r}, {str(tmp_path / "out")!r})
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(MergeError, match=r"\.out\.pema-partial: another merge is writing this output"):
            merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
        process.send_signal(signal.SIGKILL)
    assert names(tmp_path) == [".out.pema-partial", "base", "run"]
    succeeds(pair, tmp_path / "out")


def test_the_output_appears_meanwhile(pair, tmp_path, monkeypatch):
    base, delta = pair
    original = api.write_plan

    def write_plan(*args):
        original(*args)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "other").write_text("")

    monkeypatch.setattr(api, "write_plan", write_plan)
    with pytest.raises(MergeError, match="out exists and was not written by a merge"):
        merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    assert names(tmp_path / "out") == ["other"]
    assert names(tmp_path) == ["base", "out", "run"]


def test_verify_finds_a_lost_write(pair, tmp_path, monkeypatch):
    base, delta = pair
    original = api.write_plan

    def write_plan(plan, folder, advance):
        original(plan, folder, advance)
        name = base.shards[base.embedding]
        if (folder / name).exists() and not (folder / "pema_merge.json").exists():
            data = bytearray((folder / name).read_bytes())
            data[-1] ^= 1
            (folder / name).write_bytes(data)

    monkeypatch.setattr(api, "write_plan", write_plan)
    with pytest.raises(MergeError, match=r"model-0000\d.*: bytes 0 to \d+ are not those of base and delta"):
        merge_checkpoint(base.folder, delta.folder, tmp_path / "out", verify=True)
    assert names(tmp_path) == ["base", "run"]


def test_a_base_that_shrinks_meanwhile(pair, tmp_path, monkeypatch):
    base, delta = pair
    original = api.check_space

    def cut(*args):
        original(*args)
        path = base.folder / base.shards[base.embedding]
        os.truncate(path, path.stat().st_size - 8)

    monkeypatch.setattr(api, "check_space", cut)
    with pytest.raises(
        FormatError, match=r"model-0000\d-of-00002.safetensors: changed while it was in use: it ends at byte \d+ now"
    ):
        merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    assert names(tmp_path) == ["base", "run"]


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("call", ["copy_file_range", "sendfile"])
def test_where_the_kernel_cannot_copy(pair, tmp_path, monkeypatch, reason, call):
    def cannot(*args):
        raise OSError(reason, "cannot")

    if call == "sendfile":
        monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(os, call, cannot)
    succeeds(pair, tmp_path / "out")


def test_sendfile(pair, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(writer, "WINDOW", 7)
    succeeds(pair, tmp_path / "out")


@pytest.mark.parametrize("window", [1, 7, 64])
def test_small_windows(pair, tmp_path, monkeypatch, window):
    monkeypatch.setattr(writer, "WINDOW", window)
    monkeypatch.setattr(writer, "CHUNK", window)
    succeeds(pair, tmp_path / "out")


def test_modes_follow_the_umask(pair, tmp_path):
    base, delta = pair
    before = os.umask(0o027)
    try:
        merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_leftovers_of_all_kinds_are_cleared(pair, tmp_path):
    stage = tmp_path / ".out.pema-partial"
    (stage / "deep" / "er").mkdir(parents=True)
    (stage / "link").symlink_to(tmp_path / "base")
    (stage / "model.safetensors").write_text("half")
    succeeds(pair, tmp_path / "out")
    assert (tmp_path / "base" / "config.json").exists()


def test_a_lock_file_that_vanishes(tmp_path, monkeypatch):
    """A stage renamed into place between opening and locking it is not the stage any more."""
    stage = tmp_path / ".x.pema-partial"

    monkeypatch.setattr(staging, "lock_exclusive", lambda fd: stage.rename(tmp_path / "x"))
    with pytest.raises(MergeError, match="another merge"):
        staging._acquire(stage)


def test_time_is_measured(pair, tmp_path):
    start = time.perf_counter()
    report = merge_checkpoint(pair[0].folder, pair[1].folder, tmp_path / "out")
    assert 0 < report.seconds <= time.perf_counter() - start
