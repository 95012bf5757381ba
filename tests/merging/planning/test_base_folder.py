"""Which base is meant where none is named, or a short name stands for the recorded one."""

import shutil
from pathlib import Path

import adapters
import pytest
from huggingface_hub import snapshot_download
from transformers import AutoModelForSequenceClassification

import pema_adapters
from pema_adapters import PartialVocabulary, PEMAConfig, merge_checkpoint
from pema_adapters.cli.merge import main
from pema_adapters.errors import BaseMismatchError, MergeError
from pema_adapters.formats.delta import read_delta
from tests.merging.conftest import read
from tests.models import USED, V

TINY = "someone/tiny"


def train(name, kind, folder="run"):
    """A delta in `folder` of the current folder, of a model loaded as `name`; its weights stand for trained ones."""
    model = AutoModelForSequenceClassification.from_pretrained(name)
    vocabulary = PartialVocabulary(USED, V)
    if kind == "full":
        pema_adapters.shrink_embeddings(model, None, vocabulary)
        pema_adapters.save_delta(model, folder)
    else:
        adapters.init(model)
        model.add_adapter("task", config=PEMAConfig())
        pema_adapters.shrink_embeddings(model, "task", vocabulary)
        model.save_adapter(folder, "task", use_safetensors=True)


@pytest.fixture(params=["adapter", "full"])
def trained(request, hub, case, tmp_path, monkeypatch):
    """A delta `run` in the current folder, of a base loaded by its Hub id. Returns the folder of that base."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    hub.publish(TINY, case.folder)
    train(TINY, request.param)
    return Path(case.folder)


def test_the_base_is_recorded(trained):
    assert read_delta("run").recorded_base == TINY


def test_no_base_from_the_hub(trained, hub, capsys):
    assert main(["--delta", "run"]) == 0
    assert f"  note:    base: {TINY}, as recorded in the delta\n" in capsys.readouterr().out
    assert read("run/merged") == read(trained)


def test_no_base_from_the_cache(trained, hub):
    snapshot_download(TINY)
    hub.stop()
    report = merge_checkpoint(base=None, delta="run")
    assert report.base == TINY
    assert read("run/merged") == read(trained)


@pytest.mark.parametrize("place", ["tiny", TINY])
def test_no_base_from_a_folder_here(trained, hub, place):
    shutil.copytree(trained, place)
    asked = len(hub.requests)
    report = merge_checkpoint(None, "run")
    assert (report.base, len(hub.requests)) == (place, asked)
    found = "" if place == TINY else "; found as the folder tiny"
    assert report.notes[0] == f"base: {TINY}, as recorded in the delta{found}"
    assert read("run/merged") == read(trained)


def test_a_folder_of_that_name_without_weights_is_passed_over(trained):
    Path("tiny").mkdir()
    assert merge_checkpoint(None, "run").base == TINY


def test_a_folder_of_that_name_with_another_model_is_refused(trained, make_case):
    shutil.copytree(make_case("roberta").folder, "tiny")
    with pytest.raises(BaseMismatchError, match=r"^tiny/config.json: model_type is 'roberta'"):
        merge_checkpoint(None, "run")


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_short_name_stands_for_the_recorded_one(trained, hub, capsys, is_cached):
    if is_cached:
        snapshot_download(TINY)
        hub.stop()
    assert main(["--base", "tiny", "--delta", "run/"]) == 0
    assert f"  note:    base tiny: stands for {TINY}, as recorded in the delta\n" in capsys.readouterr().out
    assert read("run/merged") == read(trained)


def test_a_folder_of_the_short_name_comes_first(trained, hub):
    shutil.copytree(trained, "tiny")
    hub.stop()
    report = merge_checkpoint("tiny", "run")
    assert (report.base, report.notes) == ("tiny", ())


def test_the_full_name_is_that_of_the_hub(trained, make_case):
    shutil.copytree(make_case("roberta").folder, "tiny")
    report = merge_checkpoint(TINY, "run")
    assert (report.base, report.notes) == (TINY, ())


def test_another_name_does_not_stand_for_it(trained, capsys):
    assert main(["--base", "iny", "--delta", "run"]) == 1
    assert capsys.readouterr().err == (
        "pema-merge: error: base iny: no such folder, and cannot be downloaded from the Hub (not found, or private); check "
        f"the name, or log in (hf auth login); the delta was trained on {TINY}\n"
    )


def test_neither_here_nor_on_the_hub(trained, hub, capsys):
    shutil.rmtree(hub.cache)
    hub.stop()
    for base in ([], ["--base", "tiny"]):
        assert main([*base, "--delta", "run"]) == 1
        out, err = capsys.readouterr()
        assert err.startswith(f"pema-merge: error: the delta was trained on {TINY}; give --base, for base {TINY}: no ")
        assert (out, err.count("\n")) == ("", 1)


def test_pushing_takes_the_recorded_base(trained, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert main(["--base", "tiny", "--delta", "run", "--push-to-hub", "someone/mood"]) == 0
    assert f"stands for {TINY}" in capsys.readouterr().out
    assert f"pema-merge --base {TINY} --delta run" in hub.files("someone/mood")["README.md"].decode()


@pytest.mark.parametrize("kind", ["adapter", "full"])
@pytest.mark.parametrize("name", ["models/my/base", "./base", "/models/base"])
def test_a_recorded_folder_that_is_gone(case, tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    where = "" if name.startswith("/") else ", relative to where the training ran"
    name = str(tmp_path) + name if name.startswith("/") else name
    shutil.copytree(case.folder, name)
    train(name, kind)
    assert merge_checkpoint(None, "run").notes[0] == f"base: {name}, as recorded in the delta"
    Path(name).rename("elsewhere")
    with pytest.raises(MergeError) as refused:
        merge_checkpoint(None, "run", "out")
    assert str(refused.value) == f"the delta was trained on {name}, a folder that is not here{where}; give --base"
    assert merge_checkpoint("elsewhere", "run", "out").notes == ()


def test_a_delta_that_does_not_say(make_base, make_adapter):
    delta = make_adapter(make_base())
    with pytest.raises(MergeError) as refused:
        merge_checkpoint(None, delta.folder)
    assert str(refused.value) == f"{delta.folder}: the delta does not record its base; name the base with --base"


def test_in_place_the_base_is_named(trained, capsys):
    shutil.copytree(trained, "tiny")
    with pytest.raises(MergeError, match="a merge in place changes the base; name its folder with --base"):
        merge_checkpoint(None, "run", in_place=True)
    shutil.rmtree("tiny")
    with pytest.raises(MergeError, match="base tiny: no such folder; a merge in place takes a folder of your own"):
        merge_checkpoint("tiny", "run", in_place=True)


def test_a_file_is_no_folder(trained, capsys):
    file = trained / "model.safetensors"
    assert main(["--base", str(file), "--delta", "run"]) == 1
    assert capsys.readouterr().err == (
        f"pema-merge: error: base {file}: is a file, expected the folder of a checkpoint, such as {trained}\n"
    )


def test_what_a_hostile_delta_records_is_one_safe_line(make_base, make_adapter, capsys, monkeypatch, hub):
    delta = make_adapter(make_base())
    config = delta.folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"name"', r'"model_name": "\u001b[2J\nx/' + "y" * 5000 + '", "name"'))
    assert main(["--delta", str(delta.folder)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(r"pema-merge: error: the delta was trained on \x1b[2J\nx/yyy")
    assert (out, err.count("\n"), "\x1b" in err) == ("", 1, False)
