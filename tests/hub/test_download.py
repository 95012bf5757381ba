"""Bases and deltas are downloaded from the local Hub by the real client, or found in its cache."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from pema_adapters import merge_checkpoint
from pema_adapters.errors import FormatError, MergeError
from pema_adapters.formats.delta_discovery import MERGE_MANIFEST, find_delta
from pema_adapters.hub.download import download_base, download_delta
from tests.hub import Account
from tests.merging.conftest import T, noise, oracle, read

TINY = "someone/tiny"
ADAPTER = ["adapter_config.json", "adapter.safetensors"]
SNAPSHOTS = Path("models--someone--tiny", "snapshots")
pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture
def publish(hub):
    """Put files on the Hub, each with contents of its own: of two that are the same the client asks for one."""

    def make(*names, contents=None):
        return hub.publish(TINY, {name: (contents or {}).get(name, f"this is {name}".encode()) for name in names})

    return make


@pytest.fixture
def cached(hub, make_base, make_adapter):
    """A base in the cache, as the client put it there, and a delta for it; the Hub is away."""
    base = make_base(shards=2)
    commit = hub.publish(TINY, base.folder)
    snapshot_download(TINY)
    hub.stop()
    return base, make_adapter(base), commit


def index_of(**weight_map):
    return json.dumps({"weight_map": weight_map}).encode()


@pytest.mark.parametrize("revision", [None, "main", "commit"])
def test_a_cached_base_is_used_offline(cached, tmp_path, revision):
    base, delta, commit = cached
    revision = commit if revision == "commit" else revision
    report = merge_checkpoint(TINY, delta.folder, tmp_path / "out", revision=revision)
    assert report.base == TINY
    assert read(tmp_path / "out") == oracle(base, delta)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_only_what_a_merge_needs_is_downloaded(hub, make_base, make_adapter, tmp_path):
    base = make_base(shards=2)
    delta = make_adapter(base)
    files = {path.name: path.read_bytes() for path in base.folder.iterdir()}
    others = ("pytorch_model.bin", "pytorch_model.bin.index.json", "onnx/model.onnx", "tf_model.h5")
    hub.publish(TINY, {**files, **{name: name.encode() for name in others}})
    hub.publish("someone/task", {**{path.name: path for path in delta.folder.iterdir()}, "optimizer.pt": b"state"})
    merge_checkpoint(TINY, "someone/task", tmp_path / "out")
    assert hub.downloaded(TINY) == sorted(files)
    assert hub.downloaded("someone/task") == sorted(ADAPTER)
    assert read(tmp_path / "out") == oracle(base, delta)
    merge_checkpoint(TINY, "someone/task", tmp_path / "again")
    assert hub.downloaded(TINY) == sorted(files)
    assert hub.downloaded("someone/task") == sorted(ADAPTER)


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
def test_weights_are_downloaded_in_one_format(hub, publish, names, expected):
    contents = {
        "model.safetensors.index.json": index_of(x="a.safetensors", y="b.safetensors", z="../secret"),
        "pytorch_model.bin.index.json": index_of(x="b.bin"),
    }
    small = ["config.json", "tokenizer.json", "vocab.txt", "README.md"]
    commit = publish(*names, *small, "sub/config.json", contents=contents)
    assert download_base(TINY, None) == hub.cache / SNAPSHOTS / commit
    assert hub.downloaded(TINY) == sorted([*small, *expected])


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": b"1"},
        {"pytorch_model.bin": b"1"},
        {"pytorch_model.bin.index.json": index_of(a="one.bin"), "one.bin": b"1"},
        {"model.safetensors.index.json": index_of(a="one.safetensors"), "one.safetensors": b"1"},
    ],
)
@pytest.mark.parametrize("missing", [None, "config.json", "one.bin", "one.safetensors"])
def test_only_a_complete_cache_is_used_offline(hub, files, missing):
    hub.publish(TINY, {"config.json": b"{}", **files})
    snapshot = Path(snapshot_download(TINY, ignore_patterns=missing))
    before = hub.downloaded(TINY)
    if missing not in ("config.json", *files):
        hub.stop()
        assert download_base(TINY, None) == snapshot
        return
    assert download_base(TINY, None) == snapshot
    assert hub.downloaded(TINY) == sorted([*before, missing])
    (snapshot / missing).unlink()
    hub.stop()
    with pytest.raises(MergeError, match=r"; download it once with a network, or give a folder$"):
        download_base(TINY, None)


def test_a_cache_of_from_pretrained_is_completed(hub, publish):
    publish("config.json", "model.safetensors", "tokenizer.json", "README.md")
    for name in ("config.json", "model.safetensors"):
        hf_hub_download(TINY, name)
    found = sorted(path.name for path in download_base(TINY, None).iterdir())
    assert found == hub.downloaded(TINY) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def test_a_repository_without_weights_is_refused(hub, publish):
    publish("config.json", "tf_model.h5")
    with pytest.raises(MergeError, match=r"base someone/tiny: the Hub repository holds no model\.safetensors and no"):
        download_base(TINY, None)
    assert hub.downloaded(TINY) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([*ADAPTER, "pytorch_adapter.bin", "README.md", "optimizer.pt"], ["README.md", *ADAPTER]),
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
        ([f"merged/{MERGE_MANIFEST}", *(f"{at}/{name}" for at in ("merged", ".old", "task") for name in ADAPTER)],
         [f"task/{name}" for name in ADAPTER]),
    ],
)  # fmt: skip
def test_only_the_files_of_a_delta_are_downloaded(hub, publish, names, expected):
    index = index_of(x="a.safetensors")
    commit = publish(*names, contents={name: index for name in names if name.endswith(".index.json")})
    folder = download_delta(TINY)
    assert folder == hub.cache / SNAPSHOTS / commit
    assert hub.downloaded(TINY) == sorted(expected)
    assert all((folder / name).exists() for name in expected)


@pytest.mark.parametrize(
    "names", [[], ["README.md"], ["adapter_config.json", "adapter_model.safetensors"], ["a/b/adapter_config.json"],
              ["model.safetensors"]]
)  # fmt: skip
def test_a_repository_without_delta_is_refused(hub, publish, names):
    publish(*names)
    with pytest.raises(
        MergeError, match=r"^delta someone/tiny: the Hub repository holds no delta, neither at the top nor one"
    ):
        download_delta(TINY)
    assert hub.downloaded(TINY) == []


@pytest.mark.parametrize("where", [".", "task"])
def test_a_cached_delta_is_used_offline(hub, make_base, make_adapter, tmp_path, where):
    make_adapter(make_base(), folder=f"run/{where}")
    commit = hub.publish(TINY, tmp_path / "run")
    snapshot = download_delta(TINY)
    hub.stop()
    for revision in (None, "main", commit):
        assert download_delta(TINY, revision) == snapshot
    assert find_delta(snapshot, None).samefile(snapshot / where)
    with pytest.raises(MergeError, match=r"Connection refused"):
        download_delta(TINY, "v2")
    (snapshot / where / "adapter.safetensors").unlink()
    with pytest.raises(MergeError, match=r"Connection refused"):
        download_delta(TINY)


def test_new_files_of_a_cached_delta_are_downloaded(hub, publish):
    publish(*ADAPTER)
    old = download_delta(TINY)
    new = publish(*ADAPTER, contents={"adapter.safetensors": b"new"})
    assert download_delta(TINY) == old.parent / new
    assert hub.downloaded(TINY) == sorted([*ADAPTER, "adapter.safetensors"])


def test_a_cached_delta_does_not_hide_a_refusal(hub, publish):
    publish(*ADAPTER)
    download_delta(TINY)
    hub.repositories[TINY].private = True
    with pytest.raises(MergeError, match=r"not found, or private"):
        download_delta(TINY)


def test_a_token_opens_a_gated_repository(hub, monkeypatch):
    hub.publish("others/gated", {name: name.encode() for name in ADAPTER}, gated=True)
    hub.tokens["hf_let_in"] = Account("else", granted=("others/gated",))
    monkeypatch.setenv("HF_TOKEN", "hf_let_in")
    assert (download_delta("others/gated") / ADAPTER[1]).read_bytes() == ADAPTER[1].encode()


def test_a_damaged_index_is_refused(publish):
    publish("config.json", "model.safetensors.index.json")
    with pytest.raises(FormatError, match=r"model.safetensors.index.json: not valid JSON"):
        download_base(TINY, None)


def test_an_interrupted_download_is_resumed(hub, make_base, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # else ten million bytes have to arrive to be kept
    base = make_base(extra={"lm_head.decoder": T.of(noise(50, 50))})
    delta = make_adapter(base)
    hub.publish(TINY, base.folder)
    hub.fail("GET .*model.safetensors", after_bytes=5500)
    merge_checkpoint(TINY, delta.folder, tmp_path / "out")
    assert hub.asked("GET /cdn")[-1].headers["range"] == "bytes=5000-"
    assert read(tmp_path / "out") == oracle(base, delta)


def test_a_download_that_keeps_failing_is_refused(hub, make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base)
    hub.publish(TINY, base.folder)
    hub.fail("GET .*model.safetensors", after_bytes=500, times=4)
    with pytest.raises(MergeError, match=r"^base someone/tiny: .*500 bytes read.*; download it once with a network"):
        merge_checkpoint(TINY, delta.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(TINY, delta.folder, tmp_path / "out")
    assert read(tmp_path / "out") == oracle(base, delta)


def test_too_many_requests_are_retried(hub, make_base):
    hub.publish(TINY, make_base().folder)
    hub.fail("GET .*/tree/", status=429, headers={"Retry-After": "7"}, times=2)
    hub.fail("GET .*/api/models/", status=429, headers={"Retry-After": "7"}, times=1)
    download_base(TINY, None)
    assert hub.waits[:1] == [7.0]


def test_the_cache_is_used_if_the_hub_is_down(hub, make_base):
    hub.publish(TINY, make_base().folder)
    folder = download_base(TINY, None)
    hub.fail("/api/models/", status=503, times=99)
    assert download_base(TINY, None) == folder


def test_modules_of_a_sentence_transformer_are_downloaded(hub, make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base)
    pooling = base.folder / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"mean": true}')
    (base.folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "../x"}]')
    (base.folder / "onnx").mkdir()
    (base.folder / "onnx/config.json").write_text("{}")
    hub.publish(TINY, base.folder)
    merge_checkpoint(TINY, delta.folder, tmp_path / "out")
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == '{"mean": true}'
    assert not any(name.startswith("onnx") for name in hub.downloaded(TINY))
