"""A base or a delta by its Hub id: from the cache, or downloaded. No network: the Hub is a folder."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import requests
from huggingface_hub import errors

from pema_adapters import merge_checkpoint
from pema_adapters.errors import FormatError, MergeError
from pema_adapters.formats.find import MARKER, find_delta
from pema_adapters.merging.resolve import delta_from_hub, from_hub
from tests.merging.conftest import oracle, read

COMMIT = "abc" + 37 * "0"
ADAPTER = ["adapter_config.json", "adapter.safetensors"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into_cache(cache, folder):
    """The folder as the Hub client keeps `someone/tiny`: refs, blobs, and snapshots of links to blobs."""
    repo = cache / "models--someone--tiny"
    for name in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for i, path in enumerate(path for path in sorted(folder.rglob("*")) if path.is_file()):
        link = repo / "snapshots" / COMMIT / path.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        shutil.copy(path, repo / "blobs" / str(i))
        link.symlink_to(repo / "blobs" / str(i))
    return repo / "snapshots" / COMMIT


@pytest.fixture
def cached(make_base, make_adapter, cache):
    """A base in a Hub cache, and a delta for it."""
    base = make_base(shards=2)
    return base, make_adapter(base), put_into_cache(cache, base.folder)


@pytest.fixture
def refuse(monkeypatch):
    """Make the Hub answer with an error."""

    def make(error):
        def listing(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listing)

    return make


@pytest.fixture
def offline(refuse):
    refuse(errors.OfflineModeIsEnabled("no network here"))


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Put files on the Hub; returns the names of those that are asked for."""

    def make(*names, contents=None):
        asked = []

        def download(name, file, revision=None):
            asked.append(file)
            path = tmp_path / "got" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((contents or {}).get(file, b""))
            return str(path)

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision=None: [*names])
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return asked

    return make


def index_of(**weight_map):
    return json.dumps({"weight_map": weight_map}).encode()


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_from_the_cache(cached, offline, tmp_path, revision):
    base, delta, _ = cached
    report = merge_checkpoint("someone/tiny", delta.folder, tmp_path / "out", revision=revision)
    assert report.base == "someone/tiny"
    assert read(tmp_path / "out") == oracle(base, delta)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_only_what_a_merge_needs_is_downloaded(make_base, make_adapter, tmp_path, publish):
    base = make_base(shards=2)
    delta = make_adapter(base)
    files = {path.name: path.read_bytes() for path in base.folder.iterdir()}
    asked = publish(*files, "pytorch_model.bin", "pytorch_model.bin.index.json", "onnx/model.onnx", contents=files)
    merge_checkpoint("someone/tiny", delta.folder, tmp_path / "out")
    assert sorted(asked) == sorted(files)
    assert read(tmp_path / "out") == oracle(base, delta)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.safetensors.index.json", "a.safetensors", "b.safetensors", "c.bin", "pytorch_model.bin"],
         ["a.safetensors", "b.safetensors", "model.safetensors.index.json"]),
        (["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["pytorch_model.bin"]),
        (["pytorch_model.bin.index.json", "b.bin", "c.bin"], ["b.bin", "pytorch_model.bin.index.json"]),
    ],
)  # fmt: skip
def test_weights_come_in_one_format(publish, tmp_path, names, expected):
    contents = {
        "model.safetensors.index.json": index_of(x="a.safetensors", y="b.safetensors", z="../secret"),
        "pytorch_model.bin.index.json": index_of(x="b.bin"),
    }
    small = ["config.json", "tokenizer.json", "vocab.txt", "README.md"]
    asked = publish(*names, *small, "sub/config.json", contents=contents)
    assert from_hub("someone/tiny", None) == tmp_path / "got"
    assert sorted(asked) == sorted([*small, *expected])


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": b""},
        {"pytorch_model.bin": b""},
        {"pytorch_model.bin.index.json": index_of(a="one.bin"), "one.bin": b""},
        {"model.safetensors.index.json": index_of(a="one.safetensors"), "one.safetensors": b""},
    ],
)
@pytest.mark.parametrize("missing", [None, "config.json", "one.bin", "one.safetensors"])
def test_a_cache_counts_if_it_is_whole(cache, offline, tmp_path, files, missing):
    (tmp_path / "base").mkdir()
    for name, content in {"config.json": b"{}", **files}.items():
        (tmp_path / "base" / name).write_bytes(content)
    snapshot = put_into_cache(cache, tmp_path / "base")
    (snapshot / str(missing)).unlink(missing_ok=True)
    if missing in (None, "one.bin", "one.safetensors") and missing not in files:
        assert from_hub("someone/tiny", None) == snapshot
    else:
        with pytest.raises(MergeError, match=r"no network here.*; download it once with a network, or give a folder"):
            from_hub("someone/tiny", None)


def test_a_repository_without_weights(publish):
    publish("config.json", "tf_model.h5")
    with pytest.raises(MergeError, match=r"base someone/tiny: the Hub repository holds no model\.safetensors and no"):
        from_hub("someone/tiny", None)


def answer(kind):
    response = requests.Response()
    response.status_code = 404
    return kind("404 Client Error.\n\nA lot of text", response=response)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (answer(errors.GatedRepoError), r"\(it is gated\); ask for access on its page there and log in"),
        (answer(errors.RepositoryNotFoundError), r"\(not found, or private\); check the name, or log in"),
        (answer(errors.RevisionNotFoundError), r"\(no revision 'v2'\); give a branch, tag or commit of it"),
        (answer(errors.HfHubHTTPError), r"\(404 Client Error. A lot of text\); try again later"),
        (
            errors.OfflineModeIsEnabled("no network here"),
            r"\(no network here\), and the cache does not hold it whole; ",
        ),
        (requests.ConnectionError("name resolution\nfailed"), r"\(name resolution failed\), and the cache does not"),
        (errors.LocalEntryNotFoundError("not on disk"), r"\(not on disk\), and the cache does not hold it whole"),
        (errors.HFValidationError("bad name"), r"\(bad name\); check the name"),
    ],
)
def test_what_the_hub_refuses(refuse, error, what):
    refuse(error)
    for kind, resolve in (("base", from_hub), ("delta", delta_from_hub)):
        with pytest.raises(
            MergeError, match=rf"^{kind} some/thing: no such folder, and cannot be had .*{what}"
        ) as raised:
            resolve("some/thing", "v2")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../x", "a/b/c", "", "/abs", "a b"])
def test_what_is_no_hub_id(name):
    for kind, resolve in (("base", from_hub), ("delta", delta_from_hub)):
        with pytest.raises(MergeError, match=rf"^{kind} .*: no such folder, and not a Hub id"):
            resolve(name, None)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([*ADAPTER, "pytorch_adapter.bin", "README.md", "optimizer.pt"], ADAPTER),
        (["adapter_config.json", "pytorch_adapter.bin"], ["adapter_config.json", "pytorch_adapter.bin"]),
        ([*ADAPTER, "head_config.json", "pytorch_model_head.bin", "model_head.safetensors", "adapter_interface.json"],
         [*ADAPTER, "head_config.json", "model_head.safetensors", "adapter_interface.json"]),
        ([*(f"task/{name}" for name in ADAPTER), "task/x.txt", "README.md"], [f"task/{name}" for name in ADAPTER]),
        ([*ADAPTER, *(f"task/{name}" for name in ADAPTER)], ADAPTER),
        (["config.json", "model.safetensors", "vocab.txt"], ["config.json", "model.safetensors"]),
        (["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"],
         ["config.json", "model.safetensors.index.json", "a.safetensors"]),
        (["run/config.json", "run/model.safetensors.index.json", "run/a.safetensors", "a.safetensors"],
         ["run/config.json", "run/model.safetensors.index.json", "run/a.safetensors"]),
        (["config.json", "pytorch_model.bin"], ["config.json", "pytorch_model.bin"]),
        ([f"merged/{MARKER}", *(f"{at}/{name}" for at in ("merged", ".old", "task") for name in ADAPTER)],
         [f"task/{name}" for name in ADAPTER]),
    ],
)  # fmt: skip
def test_of_a_delta_only_the_delta_is_downloaded(publish, tmp_path, names, expected):
    index = index_of(x="a.safetensors")
    asked = publish(*names, contents={name: index for name in names if name.endswith(".index.json")})
    assert delta_from_hub("someone/task") == tmp_path / "got"
    assert sorted(asked) == sorted(expected)


@pytest.mark.parametrize(
    "names", [[], ["README.md"], ["adapter_config.json", "adapter_model.safetensors"], ["a/b/adapter_config.json"],
              ["model.safetensors"]]
)  # fmt: skip
def test_a_repository_without_delta(publish, names):
    publish(*names)
    with pytest.raises(
        MergeError, match=r"^delta some/thing: the Hub repository holds no delta, neither itself nor one"
    ):
        delta_from_hub("some/thing")


@pytest.mark.parametrize("where", [".", "task"])
def test_a_delta_from_the_cache(make_base, make_adapter, cache, offline, tmp_path, where):
    delta = make_adapter(make_base(), folder=f"run/{where}")
    snapshot = put_into_cache(cache, tmp_path / "run")
    for revision in (None, "main", COMMIT):
        assert delta_from_hub("someone/tiny", revision) == snapshot
    assert find_delta(snapshot, None).samefile(snapshot / where)
    assert delta.folder.is_dir()
    with pytest.raises(MergeError, match=r"no network here"):
        delta_from_hub("someone/tiny", "v2")
    (snapshot / where / "adapter.safetensors").unlink()
    with pytest.raises(MergeError, match=r"no network here"):
        delta_from_hub("someone/tiny")


def test_a_cached_delta_does_not_hide_what_the_hub_says(make_base, make_adapter, cache, refuse, tmp_path):
    make_adapter(make_base())
    put_into_cache(cache, tmp_path / "run")
    refuse(answer(errors.RepositoryNotFoundError))
    with pytest.raises(MergeError, match=r"not found, or private"):
        delta_from_hub("someone/tiny")


def test_a_damaged_index(publish):
    publish("config.json", "model.safetensors.index.json")
    with pytest.raises(FormatError, match=r"model.safetensors.index.json: not valid JSON"):
        from_hub("someone/tiny", None)


def test_the_folder_is_the_snapshot_s(publish, tmp_path):
    publish("task/adapter_config.json", "task/adapter.safetensors")
    assert Path(delta_from_hub("someone/tiny"), "task", "adapter.safetensors").exists()
