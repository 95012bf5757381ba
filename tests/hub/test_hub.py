"""The server as the real client sees it, without faults."""

import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    create_repo,
    errors,
    hf_hub_download,
    snapshot_download,
    upload_file,
)

from . import Hub

REPO = "someone/tiny"
LARGE = bytes(range(256)) * 200
CARD = b"---\nlicense: mit\n---\n# A card\n"


@pytest.fixture
def api(hub, monkeypatch):
    """The client, logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    return HfApi()


def add(name, content):
    return CommitOperationAdd(name, content)


def puts(hub):
    return [(one.status, one.received) for one in hub.requests if one.method == "PUT"]


def test_a_folder_is_uploaded(hub, api, tmp_path):
    files = {
        "README.md": CARD,
        "config.json": b"{}",
        "sub/model.safetensors": LARGE,
        "empty.bin": b"",
        "ä b#?.txt": b"x",
    }
    for name, content in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    url = create_repo(REPO)
    assert (url.repo_id, url) == (REPO, f"{hub.url}/{REPO}")
    done = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "run", commit_message="all of it")
    assert hub.files(REPO) == files
    assert done.oid == hub.commits(REPO)[0].id
    assert [one.title for one in hub.commits(REPO)] == ["all of it", "initial commit"]
    assert [one.title for one in api.list_repo_commits(REPO)] == ["all of it", "initial commit"]
    assert sorted(api.list_repo_files(REPO)) == sorted([".gitattributes", *files])
    assert puts(hub) == [(200, len(LARGE))]
    for name, content in files.items():
        assert Path(hf_hub_download(REPO, name)).read_bytes() == content


def test_a_repository_is_created_once(hub, api):
    assert create_repo(REPO, private=True) == create_repo(REPO, exist_ok=True)
    assert hub.repositories[REPO].private
    with pytest.raises(errors.HfHubHTTPError, match="already created"):
        create_repo(REPO)
    with pytest.raises(errors.HfHubHTTPError, match="403 Forbidden: You don't have the rights"):
        create_repo("others/tiny")
    assert api.whoami()["name"] == "someone"


@pytest.mark.parametrize("chunk_size", [None, 10_000])
def test_a_large_file_is_uploaded_from_a_file_object(hub, api, chunk_size):
    class Slow(io.BytesIO):
        """A file object that is no plain one, and gives less than is asked for."""

        def read(self, size=-1):
            return super().read(min(size, 777) if size > 0 else size)

    hub.chunk_size = chunk_size
    create_repo(REPO)
    api.create_commit(
        REPO, [add("model.safetensors", Slow(LARGE)), add("small.txt", io.BytesIO(b"x"))], commit_message="m"
    )
    assert hub.files(REPO) == {"model.safetensors": LARGE, "small.txt": b"x"}
    assert puts(hub) == ([(200, 51_200)] if not chunk_size else [*5 * [(200, 10_000)], (200, 1200)])
    api.create_commit(REPO, [add("again.safetensors", LARGE)], commit_message="m")
    assert len(puts(hub)) == (6 if chunk_size else 1)


def test_large_files_are_discarded(hub, api):
    hub.store.keep_lfs, hub.chunk_size = False, 10_000
    create_repo(REPO)
    done = upload_file(path_or_fileobj=LARGE, path_in_repo="model.bin", repo_id=REPO)
    assert api.get_paths_info(REPO, "model.bin", revision=done.oid)[0].lfs.size == len(LARGE)
    assert sum(path.stat().st_size for path in hub.store.folder.iterdir()) < 2000


def test_nothing_is_left_behind(tmp_path):
    with Hub(tmp_path / "contents") as hub:
        hub.publish(REPO, {"a.txt": b"a"})
    assert not (tmp_path / "contents").exists()


def test_files_are_deleted_and_replaced(hub, api):
    hub.publish(REPO, {"a.txt": b"a", "b.txt": b"b", "sub/c.bin": b"c"})
    changes = [CommitOperationDelete("a.txt"), CommitOperationDelete("sub/"), add("b.txt", b"new")]
    api.create_commit(REPO, changes, commit_message="m")
    assert hub.files(REPO) == {"b.txt": b"new"}
    with pytest.raises(errors.EntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(REPO, [CommitOperationDelete("a.txt")], commit_message="m")
    before = hub.commits(REPO)
    api.create_commit(REPO, [add("b.txt", b"new")], commit_message="nothing new")
    assert hub.commits(REPO) == before


def test_a_pull_request_leaves_the_branch_alone(hub, api):
    hub.publish("others/tiny", {"a.txt": b"a"})
    done = api.create_commit("others/tiny", [add("b.bin", LARGE)], commit_message="m", create_pr=True)
    assert (done.pr_revision, done.pr_num) == ("refs/pr/1", 1)
    assert hub.files("others/tiny") == {"a.txt": b"a"}
    assert hub.files("others/tiny", "refs/pr/1") == {"a.txt": b"a", "b.bin": LARGE}
    assert hf_hub_download("others/tiny", "b.bin", revision="refs/pr/1")
    found = api.list_repo_refs("others/tiny", include_pull_requests=True)
    assert [one.target_commit for one in found.pull_requests] == [done.oid]
    with pytest.raises(errors.HfHubHTTPError, match="403 Forbidden"):
        api.create_commit("others/tiny", [add("c.txt", b"c")], commit_message="m")


def test_branches_and_parents(hub, api):
    first = hub.publish(REPO, {"a.txt": b"a"})
    api.create_branch(REPO, branch="old/one")
    second = upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id=REPO, parent_commit=first).oid
    assert hub.files(REPO, "old/one") == hub.files(REPO, first) == {"a.txt": b"a"}
    assert api.model_info(REPO, revision="old/one").sha == first
    assert {one.name: one.target_commit for one in api.list_repo_refs(REPO).branches} == {
        "main": second,
        "old/one": first,
    }
    with pytest.raises(errors.HfHubHTTPError, match=r"412 Client Error.*\n\nA commit has happened since"):
        upload_file(path_or_fileobj=b"c", path_in_repo="a.txt", repo_id=REPO, parent_commit=first)


def test_a_snapshot_is_downloaded(hub, tmp_path):
    hub.page_size = 2
    files = {"README.md": CARD, "config.json": b"{}", "a/b/model.safetensors": LARGE, "a/x.bin": b"1", "x.bin": b"2"}
    commit = hub.publish(REPO, files)
    folder = snapshot_download(REPO, ignore_patterns=[".gitattributes"])
    assert folder == str(hub.cache / "models--someone--tiny" / "snapshots" / commit)
    assert hub.downloaded(REPO) == sorted(files)
    found = {one.path: one for one in HfApi().list_repo_tree(REPO, recursive=True)}
    assert sorted(found) == sorted([".gitattributes", "a", "a/b", *files])
    assert found["a/b/model.safetensors"].lfs.size == len(LARGE)
    assert [one.path for one in HfApi().list_repo_tree(REPO, "a")] == ["a/b", "a/x.bin"]
    info = HfApi().model_info(REPO, files_metadata=True)
    assert (info.sha, info.card_data.license) == (commit, "mit")
    assert {one.rfilename: one.size for one in info.siblings}["a/b/model.safetensors"] == len(LARGE)


def test_a_card_is_pushed(hub, api):
    create_repo(REPO)
    ModelCard(CARD.decode()).push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == CARD
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        upload_file(path_or_fileobj=b"# no metadata", path_in_repo="README.md", repo_id=REPO)
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md.\n- YAML metadata cannot be read"):
        upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=REPO)
    assert len(hub.commits(REPO)) == 3


def test_another_process_reaches_the_server(hub, monkeypatch):
    hub.publish(REPO, {"a.bin": LARGE}, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    program = f"from huggingface_hub import hf_hub_download as get; print(get({REPO!r}, 'a.bin'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{hub.cache}{os.sep}")
    assert (done.stderr, hub.downloaded(REPO)) == ("", ["a.bin"])


def test_large_bodies_need_no_memory(hub, api, tmp_path):
    """Else the whole file would be seen in the peak."""
    size = 64 << 20
    (tmp_path / "large.bin").touch()
    os.truncate(tmp_path / "large.bin", size)
    create_repo(REPO)
    tracemalloc.start()
    upload_file(path_or_fileobj=tmp_path / "large.bin", path_in_repo="large.bin", repo_id=REPO)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert hub.store.path(hub.commits(REPO)[0].files["large.bin"].sha256).stat().st_size == size
    assert peak < size / 4
