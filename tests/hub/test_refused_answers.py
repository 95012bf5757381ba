"""Invalid tokens and malformed answers are explained in one line each, without the token."""

import subprocess
import sys

import pytest
from huggingface_hub import constants

from pema_adapters.cli.merge import main
from pema_adapters.errors import MergeError
from pema_adapters.hub.download import download_base, download_delta
from pema_adapters.hub.errors import explain, is_unreachable
from tests.merging.conftest import make_adapter, make_base  # noqa: F401 - fixtures

BASE, MERGED, SECRET = "someone/base", "team/merged", "hf_verysecret"


@pytest.fixture
def pair(make_base, make_adapter):  # noqa: F811
    base = make_base()
    return base.folder, make_adapter(base).folder


def pushing(pair, *more):
    return ["--base", str(pair[0]), "--delta", str(pair[1]), "--push-to-hub", MERGED, *more]


def check_refused(capsys, *parts):
    """One line on stderr that holds the parts, and nothing of the token."""
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert all(part in err for part in parts), err
    assert "verysecret" not in err


UNFIT = [
    (f"{SECRET}\r\nX-Other: 1", "character 14 of 25 is not printable ASCII"),
    (f"{SECRET}\x1b[2J", "character 14 of 17 is not printable ASCII"),
    (f"{SECRET} {SECRET}", "character 14 of 27 is not printable ASCII"),
    (f"{SECRET}-日本", "character 15 of 16 is not printable ASCII"),
    (f"{SECRET}-é", "character 15 of 15 is not printable ASCII"),
    (" \r\n", "it is empty"),
]


@pytest.mark.parametrize(("token", "found"), UNFIT)
def test_a_token_that_no_header_can_hold_is_refused(hub, pair, capsys, token, found):
    assert main(pushing(pair, "--token", token)) == 1
    check_refused(
        capsys, f"the token cannot be sent to the Hub: {found}; give --token as https://huggingface.co/settings"
    )
    assert not hub.requests


@pytest.mark.parametrize("token", ["hf_good\r", "hf_good\r\n", " hf_good\n"])
def test_whitespace_around_a_token_is_stripped(hub, pair, token):
    assert main(pushing(pair, "--token", token, "--quiet")) == 0
    assert "model.safetensors" in hub.files(MERGED)


@pytest.mark.parametrize("more", [["--base", BASE], ["--delta", BASE, "--output", "out"], ["--push-to-hub", MERGED]])
def test_an_invalid_token_of_the_environment_is_refused(hub, pair, capsys, monkeypatch, more):
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}-日本")
    assert main(["--base", str(pair[0]), "--delta", str(pair[1]), *more]) == 1
    check_refused(capsys, "character 15 of 16 is not printable ASCII; set HF_TOKEN as https://huggingface.co/settings")
    assert not hub.requests


@pytest.mark.parametrize(
    ("content", "found"),
    [(f"{SECRET}-日本".encode(), "character 15 of 16 is not printable ASCII"),
     (SECRET.encode() + b"\xff", "the token cannot be read (UnicodeDecodeError)")],
)  # fmt: skip
def test_an_invalid_token_of_hf_auth_login_is_refused(hub, pair, capsys, monkeypatch, tmp_path, content, found):
    (tmp_path / "token").write_bytes(content)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert main(["--base", BASE, "--delta", str(pair[1])]) == 1
    check_refused(capsys, f"{found}; log in again (hf auth login)")


@pytest.mark.parametrize("match", ["POST /api/repos/create", "POST .*/commit/", "GET /api/models/"])
def test_a_token_that_the_server_echoes_is_not_shown(hub, pair, capsys, match):
    hub.tokens[SECRET] = hub.tokens["hf_good"]
    hub.fail(match, status=403, message=f"{SECRET} may not do that")
    assert main(pushing(pair, "--token", SECRET)) == 1
    check_refused(capsys, "team/merged: cannot be pushed to (403 Forbidden: ... may not do that")


def a_commit_that_is_a_path(hub):
    hub.fail("GET /api/models/someone/base$", json={"id": BASE, "sha": "../../x"}, times=9)
    return "the Hub says that it is at '../../x', expected a commit id"


def no_commit(hub):
    hub.fail("GET /api/models/someone/base$", json={"id": BASE}, times=9)
    return "the Hub says that it is at 'None', expected a commit id"


def a_file_of_a_commit_that_is_a_path(hub):
    hub.fail("HEAD", json=[], headers={"X-Repo-Commit": "../../x", "ETag": '"1"'}, times=9)
    return "cannot be downloaded from the Hub ("


def a_file_of_another_commit(hub):
    hub.fail("HEAD .*/config.json", json=[], headers={"X-Repo-Commit": "1" * 40, "ETag": '"1"'}, times=9)
    hub.fail("GET .*/config.json", json=[], times=9)
    return f"the Hub gave a file of commit '{'1' * 40}', expected "


def a_name_above_the_repository(hub):
    hub.fail("/tree/", json=[{"type": "file", "oid": "1", "size": 1, "path": "../model.safetensors"}], times=9)
    return "the Hub lists '../model.safetensors', expected paths in the repository"


def a_number_for_a_name(hub):
    hub.fail("/tree/", json=[{"type": "file", "oid": "1", "size": 1, "path": 5}], times=9)
    return "the Hub lists 5, expected paths in the repository"


def a_number_for_a_list(hub):
    hub.fail("/tree/", json=5, times=9)
    return "(its answer is not one of the Hub's: 'int' object is not iterable); check HF_ENDPOINT, or try again later"


def text_for_an_object(hub):
    hub.fail("GET /api/models/someone/base$", json="text", times=9)
    return "(its answer is not one of the Hub's: "


def redirects_without_end(hub):
    hub.fail("HEAD", status=302, headers={"Location": f"/{BASE}/resolve/main/config.json"}, times=9999)
    return "(it redirects without end); check HF_ENDPOINT and the proxy"


def redirects_to_itself(hub):
    hub.fail("GET /api/models/", status=302, headers={"Location": f"{hub.url}/api/models/x"}, times=9999)
    return "(it redirects without end); check HF_ENDPOINT and the proxy"


@pytest.mark.parametrize(
    "arrange",
    [a_commit_that_is_a_path, no_commit, a_file_of_a_commit_that_is_a_path, a_file_of_another_commit,
     a_name_above_the_repository, a_number_for_a_name, a_number_for_a_list, text_for_an_object, redirects_without_end,
     redirects_to_itself],
)  # fmt: skip
def test_a_malformed_answer_is_refused(hub, pair, capsys, arrange):
    hub.publish(BASE, pair[0])
    expected = arrange(hub)
    assert main(["--base", BASE, "--delta", str(pair[1])]) == 1
    check_refused(capsys, f"pema-merge: error: base {BASE}: ", expected)
    assert not (pair[1] / "merged").exists()


def test_all_tries_of_the_client_make_one_line(hub, pair, tmp_path):
    hub.publish(BASE, pair[0])
    hub.fail("HEAD", status=503, times=2)
    hub.fail("HEAD", after_bytes=0, times=99)
    # time.sleep: the client would wait between its tries
    program = "import sys, time; from pema_adapters.cli.merge import main; time.sleep = int; sys.exit(main())"
    command = [sys.executable, "-c", program, "--base", BASE, "--delta", str(pair[1])]
    environment = hub.environment(tmp_path / "home")
    environment.pop("HF_HUB_VERBOSITY", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "the local cache has no complete copy" in done.stderr


def test_a_base_is_of_one_commit_even_if_something_is_pushed(hub, pair):
    first = hub.publish(BASE, pair[0])
    newer = {path.name: path.read_bytes() for path in pair[0].iterdir()} | {"tokenizer.json": b'{"newer": true}'}
    hub.fail("HEAD", before=lambda: hub.publish(BASE, newer), skip=1)
    folder = download_base(BASE, None)
    assert folder.name == first
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in pair[0].iterdir())
    assert (folder / "tokenizer.json").read_bytes() == (pair[0] / "tokenizer.json").read_bytes()


def test_a_delta_is_of_one_commit(hub, pair):
    first = hub.publish("someone/task", pair[1])
    newer = {path.name: path.read_bytes() for path in pair[1].iterdir()} | {"README.md": b"new"}
    hub.fail("HEAD", before=lambda: hub.publish("someone/task", newer), skip=1)
    assert download_delta("someone/task").name == first


def test_offline_a_branch_is_the_commit_that_was_downloaded(hub, pair):
    hub.publish(BASE, pair[0], revision="v2")
    folder = download_base(BASE, "v2")
    hub.stop()
    assert download_base(BASE, "v2") == folder
    with pytest.raises(MergeError, match="Connection refused"):
        download_base(BASE, None)


class TestOtherLibraries:
    """Later versions of the client raise httpx's errors, which are no OSErrors."""

    @pytest.fixture
    def httpx(self):
        return pytest.importorskip("httpx")

    def test_no_network(self, httpx):
        error = httpx.ConnectError("[Errno 111] Connection refused")
        assert explain(error, "push").startswith("([Errno 111] Connection refused); check the network and run again")
        assert is_unreachable(error)

    def test_redirects(self, httpx):
        assert explain(httpx.TooManyRedirects("x"), "download") == (
            "(it redirects without end); check HF_ENDPOINT and the proxy"
        )

    @pytest.mark.parametrize(("status", "is_gone"), [(401, False), (403, False), (429, True), (503, True)])
    def test_answers(self, httpx, status, is_gone):
        request = httpx.Request("GET", "https://huggingface.co/x", headers={"authorization": f"Bearer {SECRET}"})
        response = httpx.Response(status, request=request)
        error = httpx.HTTPStatusError(f"{status} of {SECRET}", request=request, response=response)
        assert is_unreachable(error) == is_gone
        assert SECRET not in explain(error, "download") and f"({status} of ...); " in explain(error, "download")
