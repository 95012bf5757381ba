"""Copies share blocks with the base where the file system can; where it cannot, the bytes are the same."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import MergeError
from pema_adapters.merging.output import writer
from pema_adapters.merging.plan.segments import BLOCK
from tests.merging.conftest import T, oracle, read

WIDE = np.random.default_rng(0).standard_normal((300, 400))
HEAD = {"classifier.weight": T.of(np.ones((3, 4)))}


@pytest.fixture
def big(make_base):
    """Half a megabyte after the matrix, at an odd place within a block, behind a header of whole words."""
    base = make_base(extra={"bert.encoder.wide": T.of(WIDE)})
    path = base.folder / "model.safetensors"
    data = path.read_bytes()
    start = data_start(path)
    header = data[8:start] + b" " * (-start % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])
    return base


@pytest.fixture(scope="module")
def cloning_folder(tmp_path_factory):
    """A folder on a file system of its own that can clone; needs root and mkfs."""
    maker = next((name for name in ("mkfs.xfs", "mkfs.btrfs") if shutil.which(name)), None)
    if sys.platform != "linux" or os.geteuid() or maker is None:
        pytest.skip("needs root, and xfsprogs or btrfs-progs")
    folder = tmp_path_factory.mktemp("clones")
    with (folder / "image").open("wb") as image:
        image.truncate(400 << 20)
    subprocess.run([maker, "-q", folder / "image"], check=True)
    mount = folder / "mount"
    mount.mkdir()
    if subprocess.run(["mount", "-o", "loop", folder / "image", mount], check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a file here")
    yield mount
    subprocess.run(["umount", mount], check=True)


def data_start(path):
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_a_nearly_full_disk_suffices_where_the_base_is_cloned(cloning_folder, make_base, make_adapter):
    """What is cloned takes no room: a base of 100 MB merges into 40 MB of free space."""
    source = make_base(extra={"bert.encoder.wide": T.of(np.zeros((5_000, 5_000), np.float32))})
    base, delta = cloning_folder / "large", make_adapter(source).folder
    shutil.copytree(source.folder, base)
    with (cloning_folder / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(cloning_folder).free - (40 << 20))
    report = merge_checkpoint(base, delta, cloning_folder / "out-large")
    assert any("the file system cloned" in note for note in report.notes)
    shutil.rmtree(cloning_folder / "out-large")
    with pytest.raises(MergeError, match=r"bytes free, but the merge takes 50,0\d\d,\d{3}; free some or choose"):
        merge_checkpoint(base, delta, cloning_folder / "out-large", dtype="float16")
    (cloning_folder / "filler").unlink()
    shutil.rmtree(base)


@pytest.mark.parametrize("head", [None, HEAD], ids=["same header", "new header"])
def test_the_file_system_clones(cloning_folder, big, make_adapter, head):
    delta = make_adapter(big, head=head)
    base = cloning_folder / f"base{bool(head)}"
    shutil.copytree(big.folder, base)
    report = merge_checkpoint(base, delta.folder, cloning_folder / f"out{bool(head)}", verify=True)
    assert read(cloning_folder / f"out{bool(head)}") == oracle(big, delta)
    cloned = next(int(note.split()[4].replace(",", "")) for note in report.notes if "file system cloned" in note)
    assert WIDE.size * 4 - 2 * BLOCK <= cloned < report.bytes_written


def test_elsewhere_the_bytes_are_the_same(big, make_adapter, tmp_path):
    delta = make_adapter(big, head=HEAD)
    report = merge_checkpoint(big.folder, delta.folder, tmp_path / "out", verify=True)
    assert read(tmp_path / "out") == oracle(big, delta)
    before, after = (data_start(folder / "model.safetensors") for folder in (big.folder, tmp_path / "out"))
    assert after > before and (after - before) % BLOCK == 0
    assert json.loads(json.dumps(report.to_dict()))["bytes_written"] == report.bytes_written


@pytest.mark.parametrize(
    ("at", "to", "left", "expected"),
    [
        (0, 0, 3 * BLOCK + 5, 3 * BLOCK),  # whole blocks first, then the rest
        (10, BLOCK + 10, 3 * BLOCK, BLOCK - 10),  # up to the next block
        (10, 11, 3 * BLOCK, 3 * BLOCK),  # they never meet a block together
        (0, 0, BLOCK + 1, BLOCK + 1),  # not worth it
    ],
)
def test_how_much_is_copied_at_once(at, to, left, expected):
    assert writer._align_to_block(at, to, left) == expected
