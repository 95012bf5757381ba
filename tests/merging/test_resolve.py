"""A base by its Hub id: from the cache, or downloaded. No network: the Hub is a folder."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import MergeError
from tests.merging.conftest import oracle, read


@pytest.fixture
def cached(make_base, make_adapter, tmp_path, monkeypatch):
    """A base in a Hub cache, as the Hub client lays it out: refs, blobs, and snapshots of links to blobs."""
    base = make_base(shards=2)
    delta = make_adapter(base)
    repo = tmp_path / "hub" / "models--someone--tiny"
    for folder in ("refs", "blobs", "snapshots/abc"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    for i, path in enumerate(sorted(base.folder.iterdir())):
        shutil.copy(path, repo / "blobs" / str(i))
        (repo / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{i}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return base, delta, repo


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network here")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)


@pytest.mark.parametrize("revision", [None, "main", "abc"])
def test_from_the_cache(cached, offline, tmp_path, revision):
    base, delta, _ = cached
    report = merge_checkpoint("someone/tiny", delta.folder, tmp_path / "out", revision=revision)
    assert report.base == "someone/tiny"
    assert read(tmp_path / "out") == oracle(base, delta)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_revision_that_is_not_there(cached, offline, tmp_path):
    with pytest.raises(MergeError, match=r"base someone/tiny: .* cannot be had from the Hub .no network here."):
        merge_checkpoint("someone/tiny", cached[1].folder, tmp_path / "out", revision="v2")


def test_only_what_a_merge_needs_is_downloaded(cached, tmp_path, monkeypatch):
    base, delta, repo = cached
    shutil.rmtree(repo)
    (base.folder / "pytorch_model.bin").write_text("")
    names = [path.name for path in sorted(base.folder.iterdir())] + ["onnx/model.onnx"]
    asked = []

    def download(name, file, revision=None):
        asked.append(file)
        (tmp_path / "got").mkdir(exist_ok=True)
        return str(shutil.copy(base.folder / file, tmp_path / "got" / file))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision=None: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    merge_checkpoint("someone/tiny", delta.folder, tmp_path / "out")
    assert sorted(asked) == sorted(path.name for path in base.folder.iterdir() if path.suffix != ".bin")
    assert read(tmp_path / "out") == oracle(base, delta)


def test_a_cache_that_lacks_a_shard_is_completed(cached, offline, tmp_path):
    _, delta, repo = cached
    next(Path(repo, "snapshots/abc").glob("*-00002-*")).unlink()
    with pytest.raises(MergeError, match=r"no network here"):
        merge_checkpoint("someone/tiny", delta.folder, tmp_path / "out")


def test_a_repository_without_safetensors(cached, tmp_path, monkeypatch):
    shutil.rmtree(cached[2])
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *a, **k: ["pytorch_model.bin"])
    with pytest.raises(MergeError, match=r"base someone/tiny: the Hub repository holds no model\.safetensors"):
        merge_checkpoint("someone/tiny", cached[1].folder, tmp_path / "out")
