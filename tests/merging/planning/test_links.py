"""Links in a base or a delta: what they lead to is not copied into the output, and so not published."""

import json
import shutil

import pytest
from huggingface_hub import snapshot_download

from pema_adapters import merge_checkpoint, push_merged_to_hub
from pema_adapters.errors import FormatError
from tests.merging.conftest import T, noise, oracle, read


@pytest.fixture
def home(tmp_path):
    """Files of the user, outside the base."""
    folder = tmp_path / "home"
    (folder / "keys").mkdir(parents=True)
    (folder / "keys" / "id").write_text("a private key")
    (folder / "settings.json").write_text('{"token": "secret"}')
    return folder


@pytest.fixture
def pair(make_base, make_adapter):
    base = make_base()
    return base, make_adapter(base)


def modules(base, *names):
    (base.folder / "modules.json").write_text(json.dumps([{"path": name} for name in names]))


def a_file(base, home):
    link = base.folder / "vocab.txt"
    link.symlink_to(home / "keys" / "id")
    return link


def the_config(base, home):
    link = base.folder / "config.json"
    link.unlink()
    link.symlink_to(home / "settings.json")
    return link


def a_relative_link(base, home):
    link = base.folder / "merges.txt"
    link.symlink_to("../home/keys/id")
    return link


def a_link_to_a_link(base, home):
    (base.folder / ".hidden").symlink_to(home / "keys" / "id")
    link = base.folder / "vocab.txt"
    link.symlink_to(".hidden")
    return link


def a_module(base, home):
    modules(base, "1_Pooling")
    link = base.folder / "1_Pooling"
    link.symlink_to(home)
    return link


def link_in_a_module(base, name, target):
    modules(base, "1_Pooling")
    (base.folder / "1_Pooling").mkdir()
    link = base.folder / "1_Pooling" / name
    link.symlink_to(target)
    return link


def a_folder_in_a_module(base, home):
    return link_in_a_module(base, "more", home / "keys")


def a_file_in_a_module(base, home):
    return link_in_a_module(base, "config.json", home / "settings.json")


def what_is_hidden_in_the_folder(base, home):
    (base.folder / ".git").mkdir()
    (base.folder / ".git" / "config").write_text("url = https://me:password@example.org")
    link = base.folder / "notes.txt"
    link.symlink_to(".git/config")
    return link


def a_file_like_those_of_the_cache(base, home):
    """`blobs` is a link itself."""
    (base.folder.parent / "blobs").symlink_to(home / "keys")
    link = base.folder / "vocab.txt"
    link.symlink_to("../blobs/id")
    return link


@pytest.mark.parametrize(
    "arrange",
    [a_file, the_config, a_relative_link, a_link_to_a_link, a_module, a_folder_in_a_module, a_file_in_a_module,
     what_is_hidden_in_the_folder, a_file_like_those_of_the_cache],
)  # fmt: skip
def test_a_link_that_leaves_the_base_is_refused(pair, home, hub, monkeypatch, arrange):
    base, delta = pair
    link = arrange(base, home)
    expected = rf"^{link}: is a link to /.*, outside .* or hidden in it, and would be copied .*; replace it with a copy"
    with pytest.raises(FormatError, match=expected):
        merge_checkpoint(base.folder, delta.folder)
    assert not (delta.folder / "merged").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    with pytest.raises(FormatError, match=expected):
        push_merged_to_hub(base.folder, delta.folder, "someone/x")
    assert not hub.repositories


@pytest.mark.parametrize("target", ["nowhere", "vocab.txt"])
def test_a_link_to_nothing_is_refused(pair, target):
    base, delta = pair
    (base.folder / "vocab.txt").symlink_to(target)
    with pytest.raises(FormatError, match=rf"vocab.txt: is a link to {target}, which does not exist; fetch it, or"):
        merge_checkpoint(base.folder, delta.folder)


def test_a_link_in_the_delta_is_refused(make_base, make_adapter, home):
    base = make_base()
    delta = make_adapter(base, rest={"bert.encoder.layer.0.adapters.task.down": T.of(noise(1, 4))})
    (delta.folder / "adapter_interface.json").symlink_to(home / "settings.json")
    with pytest.raises(FormatError, match=r"adapter_interface.json: is a link to .*settings.json, outside"):
        merge_checkpoint(base.folder, delta.folder)


def test_hidden_folders_are_no_modules(pair):
    base, delta = pair
    modules(base, ".git")
    (base.folder / ".git").mkdir()
    (base.folder / ".git" / "config").write_text("url = https://me:password@example.org")
    merge_checkpoint(base.folder, delta.folder)
    assert not (delta.folder / "merged" / ".git").exists()


def test_links_that_stay_inside_are_followed(pair, tmp_path):
    base, delta = pair
    (base.folder / "vocab-2.txt").write_text("words")
    (base.folder / "vocab.txt").symlink_to("vocab-2.txt")
    (tmp_path / "weights").mkdir()
    shutil.move(base.folder / "model.safetensors", tmp_path / "weights" / "x")  # it must be a checkpoint to be read
    (base.folder / "model.safetensors").symlink_to(tmp_path / "weights" / "x")
    (base.folder / "onnx").symlink_to("/")  # folders are left behind
    (tmp_path / "link").symlink_to(base.folder)
    merge_checkpoint(tmp_path / "link", delta.folder)
    out = delta.folder / "merged"
    assert (out / "vocab.txt").read_text() == "words" and not (out / "vocab.txt").is_symlink()
    assert not (out / "onnx").exists() and read(out) == oracle(base, delta)


def test_a_snapshot_in_the_cache_is_a_base(pair, hub):
    base, delta = pair
    (base.folder / "1_Pooling").mkdir()
    (base.folder / "1_Pooling" / "config.json").write_text("{}")
    modules(base, "1_Pooling")
    hub.publish("someone/tiny", base.folder)
    merge_checkpoint(snapshot_download("someone/tiny"), delta.folder)
    assert (delta.folder / "merged" / "1_Pooling" / "config.json").read_text() == "{}"
    assert read(delta.folder / "merged") == oracle(base, delta)


def test_a_snapshot_whose_blobs_lead_elsewhere_is_refused(pair, hub, home):
    base, delta = pair
    (base.folder / "vocab.txt").write_text("words")
    hub.publish("someone/tiny", base.folder)
    snapshot = hub.cache / "models--someone--tiny" / "snapshots" / "x"
    shutil.copytree(base.folder, snapshot)
    (snapshot.parents[1] / "blobs").symlink_to(home / "keys")
    (snapshot / "vocab.txt").unlink()
    (snapshot / "vocab.txt").symlink_to("../../blobs/id")
    with pytest.raises(FormatError, match=r"vocab.txt: is a link to .*/keys/id, outside"):
        merge_checkpoint(snapshot, delta.folder)


def test_in_place_a_link_stays_where_it_is(pair, home):
    base, delta = pair
    link = a_file(base, home)
    merge_checkpoint(base.folder, delta.folder, in_place=True)
    assert link.is_symlink() and read(base.folder) == oracle(base, delta)
