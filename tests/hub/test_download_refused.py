"""A base or a delta that cannot be downloaded is explained in one line, by the library and by the command."""

import subprocess
import sys

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions

from pema_adapters.cli.merge import main
from pema_adapters.errors import MergeError
from pema_adapters.hub.download import download_base, download_delta
from tests.merging.conftest import oracle, read

ADAPTER = ["adapter_config.json", "adapter.safetensors"]
pytestmark = pytest.mark.usefixtures("hub")


def a_gate(hub, monkeypatch):
    hub.create("some/thing", gated=True)
    hub.publish("some/thing", {name: name.encode() for name in (*ADAPTER, "model.safetensors")}, revision="v2")


def a_gate_that_stays_shut(hub, monkeypatch):
    a_gate(hub, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_good")


def one_of_others(hub, monkeypatch):
    hub.create("some/thing", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")


def no_such_revision(hub, monkeypatch):
    hub.publish("some/thing", {"model.safetensors": b""})


def a_wrong_token(hub, monkeypatch):
    hub.publish("some/thing", {"model.safetensors": b""}, revision="v2")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")


def a_poor_token(hub, monkeypatch):
    hub.fail("/api/models", status=403, message="enable access to gated repositories in your token settings", times=2)


def an_answer(status):
    return lambda hub, monkeypatch: hub.fail("/api/models", status=status, message="a lot of\ttext", times=9)


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()


def no_server(hub, monkeypatch):
    hub.stop()


def files_alone_fail(hub, monkeypatch):
    hub.publish("some/thing", {name: name.encode() for name in (*ADAPTER, "model.safetensors")}, revision="v2")
    hub.fail("HEAD", status=503, times=99)


@pytest.mark.parametrize(
    ("arrange", "what"),
    [
        (a_gate, r"\(it is gated\); ask for access on its page there and log in"),
        (a_gate_that_stays_shut, r"\(it is gated\); ask for access on its page there and log in"),
        (lambda *_: None, r"\(not found, or private\); check the name, or log in"),
        (one_of_others, r"\(not found, or private\); check the name, or log in"),
        (no_such_revision, r"\(no revision 'v2'\); give a branch, tag or commit of it"),
        (
            a_wrong_token,
            r"\(401 Client Error: Unauthorized: Invalid credentials in Authorization header\); the Hub rejects the token: log in \(hf auth login\), or check",
        ),
        (
            a_poor_token,
            r"\(403 Forbidden: enable access.*\); the Hub rejects the token: log in \(hf auth login\), or check HF_TOK",
        ),
        (an_answer(500), r"\(500 Server Error: Internal Server Error: a lot of text\); try again later"),
        (an_answer(429), r"\(429 Client Error: Too Many Requests: a lot of text\); try again later"),
        (offline, r"\(Cannot reach .*: offline mode is enabled.*\), and the local cache has no complete copy; "),
        (
            no_server,
            r"\(HTTPConnection.*: Failed to establish a new connection: .* Connection refused\), and the local cache has no complete copy; download it once with a network",
        ),
        (
            files_alone_fail,
            r"\(An error happened while trying to locate the file on the Hub.*\), and the local cache has no",
        ),
    ],
)
def test_each_refusal_of_the_hub_is_explained(hub, monkeypatch, arrange, what):
    arrange(hub, monkeypatch)
    for kind, resolve in (("base", download_base), ("delta", download_delta)):
        with pytest.raises(
            MergeError, match=rf"^{kind} some/thing: no such folder, and cannot be downloaded .*{what}"
        ) as raised:
            resolve("some/thing", "v2")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../x", "a/b/c", "", "/abs", "a b"])
def test_invalid_hub_ids_are_refused(hub, name):
    for kind, resolve in (("base", download_base), ("delta", download_delta)):
        with pytest.raises(MergeError, match=rf"^{kind} .*: no such folder, and not a Hub id"):
            resolve(name, None)
    assert not hub.requests


@pytest.mark.parametrize("name", ["some/a--b", "some/thing.git", "some/thing-"])
def test_ids_that_the_client_refuses_are_explained(hub, name):
    for resolve in (download_base, download_delta):
        with pytest.raises(MergeError, match=rf"{name}: no such folder, and cannot .*'{name}'.*\); check the name$"):
            resolve(name, None)


@pytest.fixture
def pair(make_base, make_adapter):
    base = make_base()
    return base, make_adapter(base)


@pytest.mark.parametrize(
    ("arrange", "more", "line"),
    [
        (lambda *_: None, [], "(not found, or private); check the name, or log in (hf auth login)"),
        (a_gate, ["--revision", "v2"],
         "(it is gated); ask for access on its page there and log in (hf auth login)"),
        (a_wrong_token, [], "(401 Client Error: Unauthorized: Invalid credentials in Authorization header); "
         "the Hub rejects the token: log in (hf auth login), or check HF_TOKEN"),
        (no_such_revision, ["--revision", "v2"], "(no revision 'v2'); give a branch, tag or commit of it"),
    ],
)  # fmt: skip
def test_the_command_reports_a_refusal_in_one_line(hub, pair, monkeypatch, capsys, arrange, more, line):
    arrange(hub, monkeypatch)
    assert main(["--base", "some/thing", "--delta", str(pair[1].folder), *more]) == 1
    start = "pema-merge: error: base some/thing: no such folder, and cannot be downloaded from the Hub "
    assert capsys.readouterr() == ("", f"{start}{line}\n")
    assert not (pair[1].folder / "merged").exists()


def test_the_command_reports_a_missing_network_in_one_line(hub, pair, tmp_path, capsys):
    hub.stop()
    assert main(["--base", str(pair[0].folder), "--delta", "some/thing", "--output", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(
        "pema-merge: error: delta some/thing: no such folder, and cannot be downloaded from the Hub (HTTP"
    )
    assert err.endswith("the local cache has no complete copy; download it once with a network, or give a folder\n")
    assert (out, err.count("\n")) == ("", 1)


def run(hub, home, output, **variables):
    """The command in a process of its own, as its entry point starts it."""
    program = "import sys; from pema_adapters.cli.merge import main; sys.exit(main())"
    arguments = ["--base", "someone/tiny", "--delta", "someone/task", "--output", str(output)]
    environment = hub.environment(home) | variables
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_settings_of_the_environment_are_used(hub, pair, tmp_path):
    base, delta = pair
    hub.publish("someone/tiny", base.folder, private=True)
    hub.publish("someone/task", delta.folder, private=True)
    home = tmp_path / "another-home"

    refused = run(hub, home, tmp_path / "none")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert (
        "someone/task: no such folder, and cannot be downloaded from the Hub (not found, or private)" in refused.stderr
    )

    done = run(hub, home, tmp_path / "out", HF_TOKEN="hf_good")
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path / "out") == oracle(base, delta)
    assert hub.downloaded("someone/task") == sorted(ADAPTER)
    assert {path.name for path in (home / "hub").glob("models--*")} == {
        "models--someone--tiny",
        "models--someone--task",
    }
    assert not hub.home.exists()

    asked = len(hub.requests)
    again = run(hub, home, tmp_path / "again", HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stderr) == (0, "")
    assert read(tmp_path / "again") == oracle(base, delta)
    empty = run(hub, tmp_path / "empty", tmp_path / "none", HF_HUB_OFFLINE="1", HF_TOKEN="hf_good")
    assert (empty.returncode, empty.stdout, empty.stderr.count("\n")) == (1, "", 1)
    assert "someone/task" in empty.stderr
    assert "offline mode is enabled" in empty.stderr
    assert empty.stderr.endswith("; download it once with a network, or give a folder\n")
    assert len(hub.requests) == asked
