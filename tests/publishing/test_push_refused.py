"""Pushes that are refused or fail say so in one line, and the repository stays as it was."""

import shutil
from types import SimpleNamespace

import pytest

from pema_adapters import push_merged_to_hub
from pema_adapters.cli.merge import main
from pema_adapters.errors import InputChangedError, MergeError
from pema_adapters.publishing import push
from tests.publishing.repositories import BASE, MERGED

FAULTS = [
    ({"match": r"PUT ", "after_bytes": 1000}, True),
    ({"match": r"PUT ", "status": 503, "times": 2}, True),
    ({"match": r"PUT ", "status": 500, "times": 9}, False),
    ({"match": r"POST .*/commit/", "status": 403, "message": "Private repository storage limit reached"}, False),
    ({"match": r"POST .*/objects/batch", "status": 429, "headers": {"Retry-After": "7"}, "times": 9}, False),
    ({"match": r"POST .*/commit/", "after_bytes": 100, "times": 9}, False),
]


@pytest.mark.parametrize(("fault", "recovers"), FAULTS)
def test_faults(account, delta, fault, recovers):
    account.publish(MERGED, {"notes.txt": b"mine"})
    before, commits = account.files(MERGED), account.commits(MERGED)
    account.fail(**fault)
    if recovers:
        push_merged_to_hub(BASE, delta, MERGED)
    else:
        with pytest.raises(MergeError, match=r"team/merged: cannot be pushed to \(.*\); \w+") as error:
            push_merged_to_hub(BASE, delta, MERGED)
        assert "\n" not in str(error.value)
        assert account.files(MERGED) == before and account.commits(MERGED) == commits
        account.faults.clear()
        push_merged_to_hub(BASE, delta, MERGED)
    assert "model.safetensors" in account.files(MERGED)


def test_too_many_requests(account, delta):
    account.fail(match=r"POST .*/objects/batch", status=429, headers={"Retry-After": "7"}, times=2)
    account.fail(match=r"POST .*/commit/", status=429, times=1)
    push_merged_to_hub(BASE, delta, MERGED)
    assert account.waits[-3:] == [7.0, 7.0, 30.0] and len(account.commits(MERGED)) == 2


def test_what_is_uploaded_is_not_sent_again(account, delta):
    account.fail(match=r"POST .*/commit/", status=500, times=9)
    with pytest.raises(MergeError, match="run again, what is uploaded is not sent again"):
        push_merged_to_hub(BASE, delta, MERGED)
    account.faults.clear()
    before = len([request for request in account.requests if request.method == "PUT"])
    push_merged_to_hub(BASE, delta, MERGED)
    assert before == len([request for request in account.requests if request.method == "PUT"]) > 0


def test_no_token(account, delta, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        MergeError, match=r"team/merged: cannot be pushed to \(no token, or .*\); log in \(hf auth login\), or"
    ):
        push_merged_to_hub(BASE, delta, MERGED)
    assert MERGED not in account.repositories


def test_a_wrong_token(account, delta, base):
    with pytest.raises(MergeError, match=r"base someone/base: .*401.*; the Hub rejects the token: log in"):
        push_merged_to_hub(BASE, delta, MERGED, token="hf_bad")
    with pytest.raises(MergeError, match=r"team/merged: cannot be pushed to \(no token, or one .*\); log in"):
        push_merged_to_hub(base.folder, delta, MERGED, token="hf_bad")
    assert MERGED not in account.repositories


def test_a_token_for_all(account, delta, base, monkeypatch):
    """The base is private, and the token is not in the environment."""
    monkeypatch.delenv("HF_TOKEN")
    account.repositories[BASE].private = True
    push_merged_to_hub(BASE, delta, MERGED, token="hf_good")
    assert "model.safetensors" in account.files(MERGED)


def test_someone_else_s_repository(account, delta):
    with pytest.raises(MergeError, match=r"nobody/x: cannot be pushed to \(.*\); give a token that may write there"):
        push_merged_to_hub(BASE, delta, "nobody/x")


def test_no_network(account, delta):
    account.stop()
    with pytest.raises(MergeError, match=r"team/merged: cannot be pushed to \(.*\); check the network and run again"):
        push_merged_to_hub(BASE, delta, MERGED)


def test_the_base_changes_meanwhile(account, delta, base, tmp_path):
    """What the plan says while the client reads it is what the caller hears."""
    folder = shutil.copytree(base.folder, tmp_path / "mine")

    def shorten():
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])

    account.fail("POST .*/repos/create", before=shorten)
    with pytest.raises(InputChangedError, match=r"mine/model.safetensors: .* it ends at byte 5,000 now"):
        push_merged_to_hub(folder, delta, MERGED)
    assert account.files(MERGED) == {}


def test_the_base_changes_while_the_commit_is_made(account, delta, base, tmp_path, monkeypatch):
    """The client reads small files last, after the weights are uploaded and all inputs are checked."""
    folder = shutil.copytree(base.folder, tmp_path / "mine")
    (folder / "notes.txt").write_text("old")
    upload = push._upload

    def upload_first(target, operations):
        upload(target, operations)
        stream = next(one for one in operations if one.path_in_repo == "notes.txt").path_or_fileobj.raw
        read = stream.file.read

        def replace_and_read(begin, end):
            (folder / "notes.txt").write_text("new")
            return read(begin, end)

        stream.file = SimpleNamespace(read=replace_and_read, size=stream.file.size)

    monkeypatch.setattr(push, "_upload", upload_first)
    with pytest.raises(InputChangedError, match=r"notes\.txt: changed while it was in use"):
        push_merged_to_hub(folder, delta, MERGED)
    assert account.files(MERGED) == {}


@pytest.mark.parametrize(
    "wrong", [["--private"], ["--token", "x"], ["--push-to-hub", "a/b", "--in-place"], ["--create-pr"]]
)
def test_wrong_usage(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--base", "x", "--delta", "y", *wrong])
    assert error.value.code == 2 and "--push-to-hub" in capsys.readouterr().err
