"""A config.json of the base that nobody can load, and an adapter_config.json that is another's."""

import json

import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.cli.merge import main
from tests.merging.conftest import T, V, noise
from tests.merging.corpus import refused


@pytest.fixture
def root(tmp_path, make_base, make_adapter):
    make_adapter(make_base(), head={"classifier.weight": T.of(noise(3, 4))})
    return tmp_path


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_bytes()) | settings))


SIZES = [
    (-1, "vocab_size is -1; expected a number above 0"),
    (0, "vocab_size is 0; expected a number above 0"),
    ("many", 'vocab_size is "many"; expected a number above 0'),
    (True, "vocab_size is true; expected a number above 0"),
    (None, "vocab_size is null; expected a number above 0"),
    (
        V + 1,
        rf"vocab_size is {V + 1}, but tensor 'bert.embeddings.word_embeddings.weight' of model.safetensors has {V} rows; "
        "Transformers does not load such a checkpoint: correct config.json first",
    ),
]


@pytest.mark.parametrize(("size", "text"), SIZES)
def test_another_vocabulary_size_than_the_matrix_has(root, size, text):
    change(root / "base" / "config.json", vocab_size=size)
    assert "base/config.json: " in refused(root, text)


def test_the_command_line_says_so_in_one_line(root, capsys):
    change(root / "base" / "config.json", vocab_size="many")
    assert main(["--base", str(root / "base"), "--delta", str(root / "run"), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and 'vocab_size is "many"' in said


@pytest.mark.parametrize("target", ["nowhere", "config.json"])
def test_a_link_that_leads_nowhere(root, target):
    path = root / "base" / "config.json"
    path.unlink()
    path.symlink_to(path.parent / target)
    refused(root, "base/config.json: a link that leads to no file; put config.json in its place, or remove the link")


def test_without_a_config_the_report_says_so(root):
    (root / "base" / "config.json").unlink()
    report = merge_checkpoint(root / "base", root / "run", root / "out")
    assert report.notes[0].startswith("the base has no config.json, or an empty one, so the output has none")
    assert not (root / "out" / "config.json").exists()


ADAPTERS = [
    ({"name": "other"}, "holds the PEMA rows of adapter 'task', but adapter_config.json is that of 'other'; save"),
    ({"name": None}, "adapter_config.json: expected the name of the adapter, found null"),
    ({"name": 3}, "adapter_config.json: expected the name of the adapter, found 3"),
    *(({"name": name}, "cannot be the name of a folder") for name in ("", "/etc/passwd", "../task", "a/b")),
    ({"config": None}, "adapter_config.json: config holds null; expected a method, or a union of methods"),
    ({"config": {"architecture": "union", "configs": 3}}, '"configs" of the union is 3; expected a list'),
]


@pytest.mark.parametrize(("settings", "text"), ADAPTERS)
def test_an_adapter_config_that_is_damaged(root, settings, text):
    change(root / "run" / "adapter_config.json", **settings)
    refused(root, text)


@pytest.mark.parametrize("key", ["name", "config"])
def test_an_adapter_config_that_lacks_something(root, key):
    path = root / "run" / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_bytes()).items() if k != key}))
    refused(root, "adapter_config.json: .* null")


def test_a_classifier_of_another_size_is_noted(tmp_path, make_base, make_adapter):
    make_adapter(
        make_base(extra={"classifier.weight": T.of(noise(2, 4))}), head={"classifier.weight": T.of(noise(3, 4))}
    )
    report = merge_checkpoint(tmp_path / "base", tmp_path / "run", tmp_path / "out")
    assert "head classifier.weight: [3, 4] takes the place of [2, 4]" in report.notes
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
