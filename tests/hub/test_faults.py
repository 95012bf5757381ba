"""How the real client reacts to refusals and broken connections: its exceptions and its retries."""

from pathlib import Path

import pytest
import requests
from huggingface_hub import HfApi, constants, create_repo, errors, hf_hub_download, upload_file

from . import Account
from .answers import QUOTA

REPO = "someone/tiny"
LARGE = bytes(range(256)) * 200


@pytest.fixture
def api(hub, monkeypatch):
    """The client, logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    return HfApi()


@pytest.fixture
def small_pieces(monkeypatch):
    """The client writes what it downloads a thousand bytes at a time, as it does ten million."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


def puts(hub):
    return [(one.status, one.received) for one in hub.requests if one.method == "PUT"]


def test_private_repositories_are_hidden(hub, monkeypatch):
    hub.publish(REPO, {"a.txt": b"a"}, private=True)
    hub.tokens["hf_other"] = Account("other")
    for token, status in ((None, 401), ("hf_other", 404)):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        for name in (REPO, "someone/none"):
            for ask in (lambda name: hf_hub_download(name, "a.txt"), HfApi().model_info, HfApi().list_repo_files):
                with pytest.raises(errors.RepositoryNotFoundError, match=f"^{status} Client Error"):
                    list(ask(name))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert hf_hub_download(REPO, "a.txt")


def test_missing_things_are_not_found(hub):
    hub.publish(REPO, {"a.txt": b"a"})
    with pytest.raises(errors.EntryNotFoundError):
        hf_hub_download(REPO, "b.txt")
    for revision in ("v2", 40 * "0"):
        with pytest.raises(errors.RevisionNotFoundError, match=f"Invalid rev id: {revision}"):
            hf_hub_download(REPO, "a.txt", revision=revision)
        with pytest.raises(errors.RevisionNotFoundError):
            HfApi().list_repo_files(REPO, revision=revision)


def test_gated_repositories_need_access(hub, monkeypatch):
    hub.publish("others/gated", {"a.txt": b"a"}, gated=True)
    assert HfApi().model_info("others/gated").gated == "auto"
    assert HfApi().list_repo_files("others/gated") == [".gitattributes", "a.txt"]
    with pytest.raises(errors.GatedRepoError, match=r"^401 .*\n\n.*\n.*Please log in"):
        hf_hub_download("others/gated", "a.txt")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with pytest.raises(errors.GatedRepoError, match=r"^403 .*\n\n.*\n.*not in the authorized list"):
        hf_hub_download("others/gated", "a.txt")
    hub.tokens["hf_good"] = Account("someone", granted=("others/gated",))
    assert hf_hub_download("others/gated", "a.txt")


def test_a_wrong_token_is_refused_even_for_public_repositories(hub, monkeypatch):
    hub.publish(REPO, {"a.txt": b"a"})
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    for ask in (lambda: HfApi().list_repo_files(REPO), lambda: hf_hub_download(REPO, "a.txt")):
        with pytest.raises(errors.HfHubHTTPError, match="Invalid credentials in Authorization header") as raised:
            ask()
        assert type(raised.value) is errors.HfHubHTTPError
    with pytest.raises(requests.HTTPError, match="token from HF_TOKEN environment variable is invalid"):
        HfApi().whoami()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(errors.RepositoryNotFoundError):
        upload_file(path_or_fileobj=b"", path_in_repo="a.txt", repo_id=REPO)


def test_an_interrupted_download_is_resumed(hub, small_pieces):
    hub.publish(REPO, {"model.safetensors": LARGE})
    hub.fail("GET .*model.safetensors", after_bytes=20_500)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        hf_hub_download(REPO, "model.safetensors")
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == LARGE
    first, second = hub.asked("GET /cdn")
    assert (first.sent, second.headers["range"], second.status, second.sent) == (20_500, "bytes=20000-", 206, 31_200)


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 500}, {"after_bytes": 0}])
def test_faults_that_the_client_retries(hub, fault):
    hub.publish(REPO, {"a.bin": LARGE})
    hub.fail("HEAD", times=2, **fault)
    assert hf_hub_download(REPO, "a.bin")
    assert hub.waits == [1, 2]
    if "status" in fault:
        hub.fail("GET .*b.bin", times=1, **fault)
        hub.publish(REPO, {"b.bin": LARGE + b"!"})
        assert hf_hub_download(REPO, "b.bin")
        assert hub.waits == [1, 2, 1]


def test_faults_that_the_client_does_not_retry(hub, api):
    hub.publish(REPO, {"a.txt": b"a"})
    hub.fail("/api/models", status=503)
    with pytest.raises(errors.HfHubHTTPError, match="503 Server Error"):
        api.list_repo_files(REPO)
    hub.fail("/api/models", status=429, headers={"Retry-After": "7"}, message="slow down")
    with pytest.raises(errors.HfHubHTTPError, match="429 Client Error") as raised:
        api.list_repo_files(REPO)
    assert raised.value.response.headers["Retry-After"] == "7"
    hub.fail("POST .*/commit/", status=503)
    with pytest.raises(errors.HfHubHTTPError, match="503 Server Error"):
        upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id=REPO)
    assert hub.waits == []


@pytest.mark.parametrize("chunk_size", [None, 10_000])
@pytest.mark.parametrize("fault", [{"after_bytes": 5000}, {"status": 500}])
def test_an_interrupted_upload_is_retried(hub, api, chunk_size, fault):
    hub.chunk_size = chunk_size
    create_repo(REPO)
    hub.fail("PUT", skip=2 if chunk_size else 0, times=2, **fault)
    upload_file(path_or_fileobj=LARGE, path_in_repo="a.bin", repo_id=REPO)
    assert hub.files(REPO) == {"a.bin": LARGE}
    assert hub.waits == [1, 2]


def test_an_upload_that_keeps_failing_is_refused(hub, api):
    create_repo(REPO)
    hub.fail("PUT", after_bytes=5000, times=99)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'a.bin' to the Hub.") as raised:
        upload_file(path_or_fileobj=LARGE, path_in_repo="a.bin", repo_id=REPO)
    assert isinstance(raised.value.__cause__, requests.ConnectionError)
    assert puts(hub) == 6 * [(None, 5000)]
    assert hub.files(REPO) == {}


@pytest.mark.parametrize("where", ["POST .*/objects/batch", "POST .*/commit/"])
def test_a_quota_is_enforced(hub, api, where):
    create_repo(REPO)
    hub.fail(where, status=403, message=QUOTA)
    with pytest.raises(errors.HfHubHTTPError, match="403 Forbidden: Private repository storage limit reached"):
        upload_file(path_or_fileobj=LARGE, path_in_repo="a.bin", repo_id=REPO)


def test_without_the_server_there_is_no_network(hub):
    hub.publish(REPO, {"a.txt": b"a"})
    hf_hub_download(REPO, "a.txt")
    hub.stop()
    assert hf_hub_download(REPO, "a.txt")
    with pytest.raises(errors.LocalEntryNotFoundError):
        hf_hub_download(REPO, "b.txt")
    with pytest.raises(requests.ConnectionError):
        HfApi().list_repo_files(REPO)
