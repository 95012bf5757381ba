"""Every refusal names what is wrong, and leaves the disk as it was."""

import json
import re
import shutil
from pathlib import Path

import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.errors import BaseMismatchError, FormatError, MergeError
from tests.merging.conftest import IDS, D, E, T, V, backbone, noise, write

ROWS = T.of(noise(len(IDS), D))
MATRIX = backbone()[E]


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(tmp_path, kind, text, *args, **kwargs):
    before = snapshot(tmp_path)
    with pytest.raises(kind, match=text) as error:
        merge_checkpoint(*args, **kwargs)
    assert snapshot(tmp_path) == before
    assert "\n" not in str(error.value)


def damaged(part, tensor):
    return {"replace": {part: tensor}}


DAMAGE = {
    "unsorted": (
        damaged("token_ids", T.of([2, 3, 4, 17, 9, 19], "I32")),
        "strictly increasing, found 17 before 9 at 3",
    ),
    "repeated": (damaged("token_ids", T.of([2, 3, 3, 9, 17, 19], "I32")), "strictly increasing, found 3 before 3 at 1"),
    "negative": (damaged("token_ids", T.of([-1, 3, 4, 9, 17, 19], "I32")), "begins with -1; expected ids from 0"),
    "beyond V": (damaged("token_ids", T.of([2, 3, 4, 9, 17, V], "I32")), f"goes up to {V}; expected ids below V = {V}"),
    "floats": (damaged("token_ids", T.of(IDS, "F32")), r"is F32 \[6\]; expected I32 \[K\]"),
    "two-dimensional": (damaged("token_ids", T.of([IDS], "I32")), r"is I32 \[1, 6\]; expected I32 \[K\]"),
    "too few rows": (damaged("weight", T.of(noise(5, D))), "has 5 rows for 6 token_ids"),
    "flat rows": (damaged("weight", T.of(noise(6))), r"is F32 \[6\]; expected rows \[K, d\] of floats"),
    "integer rows": (damaged("weight", T.of(noise(6, D), "I32")), r"is I32 \[6, 4\]; expected rows \[K, d\] of floats"),
    "no rows": ({"drop": ["weight"]}, "PEMA rows without 'weight'"),
    "no ids": ({"drop": ["token_ids"]}, "PEMA rows without 'token_ids'"),
    "nothing": (
        {"drop": ["weight", "token_ids", "fingerprint"]},
        "expected the PEMA rows that adapter_config.json names, found none",
    ),
    "nonsense fingerprint": (damaged("fingerprint", T.of([1, 2], "U8")), "fingerprint cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact(make_base, make_adapter, tmp_path, damage):
    changes, text = DAMAGE[damage]
    base = make_base()
    delta = make_adapter(base, **changes)
    refused(tmp_path, FormatError, f"adapter.safetensors.*{text}", base.folder, delta.folder)


def test_no_fingerprint(make_base, make_adapter, make_full, tmp_path):
    base = make_base()
    adapter = make_adapter(base, drop=["fingerprint"])
    full = make_full(base, drop=[".fingerprint"], folder="full")
    for delta in (adapter, full):
        refused(tmp_path, BaseMismatchError, "no fingerprint .* --allow-base-mismatch", base.folder, delta.folder)
        report = merge_checkpoint(base.folder, delta.folder, allow_base_mismatch=True)
        assert report.rows_merged == len(IDS)
        assert "merged all the same" in report.notes[0]


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("own_base", [True, False])
def test_names_are_found_without_a_fingerprint(make_base, make_full, tmp_path, prefixed, own_base):
    base = make_base(prefixed=prefixed)
    outputs = []
    for drop in ([], [".fingerprint"]):
        delta = make_full(base, own_base=own_base, drop=drop, folder=f"run{len(drop)}")
        merge_checkpoint(base.folder, delta.folder, allow_base_mismatch=True)
        outputs.append((delta.folder / "merged" / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1]


def changed_base(make_base, name, tensor):
    other = make_base(name="other")
    write(other.folder / "model.safetensors", other.tensors | {name: tensor})
    return other.folder


def test_another_base(make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base).folder
    layer = "bert.encoder.layer.0.output.dense.weight"
    cases = [
        (base.embedding, T.of(noise(V, D, seed=40)), "rows of the delta's tokens differ"),
        (base.embedding, T.of(noise(V + 1, D)), "has 21 rows, expected 20"),
        (layer, T.of(noise(D, D, seed=41)), f"tensor '{layer}': sampled values differ"),
        (layer, T.of(noise(D, D + 1)), re.escape("has shape [4, 5], expected [4, 4]")),
    ]
    for name, tensor, text in cases:
        other = changed_base(make_base, name, tensor)
        refused(tmp_path, BaseMismatchError, f"other: .*{text}.*--allow-base-mismatch", other, delta)
        shutil.rmtree(other)
    other = make_base(name="other")
    write(other.folder / "model.safetensors", {n: t for n, t in other.tensors.items() if n != layer})
    refused(tmp_path, BaseMismatchError, "no tensor 'encoder.layer.0.output.dense.weight'", other.folder, delta)


def test_the_base_saved_again_in_a_wider_dtype_is_the_same(make_base, make_adapter, tmp_path):
    base = make_base(dtype="BF16")
    wide = changed_base(make_base, "x", T.of([0.0]))
    write(wide / "model.safetensors", {n: t.to("F32") if t.dtype == "BF16" else t for n, t in base.tensors.items()})
    assert merge_checkpoint(wide, make_adapter(base).folder).notes == ()


def test_rows_that_cannot_fit_even_if_insisted(make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base).folder
    narrow = changed_base(make_base, base.embedding, T.of(noise(V, D - 1)))
    refused(tmp_path, BaseMismatchError, "cannot take rows of 4 numbers", narrow, delta, allow_base_mismatch=True)
    shutil.rmtree(narrow)
    short = changed_base(make_base, base.embedding, T.of(noise(V - 1, D)))
    text = "row for token 19; expected ids below 19"
    refused(tmp_path, BaseMismatchError, text, short, delta, allow_base_mismatch=True)


def test_a_backbone_weight_of_another_shape(make_base, make_full, tmp_path):
    base = make_base()
    delta = make_full(base, replace={"bert.pooler.dense.bias": T.of(noise(D + 1))})
    text = r"model.safetensors: tensor 'bert.pooler.dense.bias' has shape \[5\], but model.safetensors of the base has \[4\]"
    refused(tmp_path, MergeError, text, base.folder, delta.folder)


def test_a_backbone_weight_of_another_kind(make_base, make_full, tmp_path):
    base = make_base()
    delta = make_full(base, replace={"bert.embeddings.position_ids": T.of(noise(7))})
    text = "tensor 'bert.embeddings.position_ids' is F32, but the base has it as I64"
    refused(tmp_path, MergeError, text, base.folder, delta.folder)


def test_a_value_too_large_for_the_bases_dtype(make_base, make_adapter, tmp_path):
    base = make_base(dtype="F16")
    delta = make_adapter(base, replace={"weight": T.of(noise(6, D) + 1e6)})
    refused(
        tmp_path,
        MergeError,
        "weight': a value of 1e.06 is too large for the dtype F16",
        base.folder,
        delta.folder,
    )


def test_a_grown_vocabulary_that_is_not_whole(make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base, ids=[*IDS, V + 1], vocab_size=V + 2)
    refused(tmp_path, MergeError, "rows for the new tokens 20 to 21 are missing", base.folder, delta.folder)


def test_a_grown_vocabulary_with_untied_output(make_base, make_adapter, tmp_path):
    base = make_base(extra={"lm_head.weight": T.of(noise(V, D, seed=3))})
    delta = make_adapter(base, ids=[*IDS, V], vocab_size=V + 1)
    text = "'lm_head.weight' .* is an output matrix of its own"
    refused(tmp_path, MergeError, text, base.folder, delta.folder)


def test_an_ordinary_checkpoint_as_delta(make_base, tmp_path):
    base = make_base()
    other = make_base(name="other")
    text = "other.model.safetensors: an ordinary checkpoint, not a delta"
    refused(tmp_path, FormatError, text, base.folder, other.folder, tmp_path / "out")


def test_folders_that_hold_no_delta(make_base, tmp_path):
    base = make_base().folder
    (tmp_path / "empty").mkdir()
    refused(tmp_path, FormatError, "empty: no delta here or up to two levels below", base, tmp_path / "empty")
    refused(tmp_path, FormatError, "nowhere: no such folder", base, tmp_path / "nowhere")


def test_several_adapters(make_base, make_adapter, tmp_path):
    base = make_base()
    for name in ("one", "two"):
        make_adapter(base, name=name, folder=f"run/{name}")
    run = tmp_path / "run"
    refused(tmp_path, FormatError, r"run: holds 2 deltas \(one, two\); pick one with --adapter NAME", base.folder, run)
    refused(tmp_path, FormatError, "no adapter 'three' here; found: one, two", base.folder, run, adapter="three")
    report = merge_checkpoint(base.folder, run, adapter="two")
    assert report.delta == str(run / "two")
    assert report.output == str(run / "merged")
    refused(tmp_path, FormatError, "no adapter 'one' here; found: two", base.folder, run / "two", adapter="one")


def test_the_only_adapter_with_rows_is_taken(make_base, make_adapter, tmp_path):
    base = make_base()
    make_adapter(base, folder="run/task")
    other = make_adapter(base, folder="run/other").folder
    (other / "adapter_config.json").write_text(json.dumps({"name": "other", "config": {"architecture": "lora"}}))
    assert merge_checkpoint(base.folder, tmp_path / "run").delta == str(tmp_path / "run" / "task")


def test_what_an_earlier_merge_wrote_is_no_delta(make_base, make_adapter, tmp_path):
    base = make_base()
    make_adapter(base, folder="run/task")
    merge_checkpoint(base.folder, tmp_path / "run")
    assert merge_checkpoint(base.folder, tmp_path / "run", overwrite=True).delta == str(tmp_path / "run" / "task")


def test_config_and_weights_that_disagree(make_base, make_adapter, tmp_path):
    base = make_base()
    rest = {"bert.adapters.task.x": T.of([1.0])}
    for changes, config, text in (
        ({"rest": rest, "folder": "a"}, "pema", "names no method besides PEMA, but the weights hold others"),
        (
            {"folder": "b"},
            {"configs": ["pema", "seq_bn"]},
            "names methods besides PEMA, but the weights hold none",
        ),
    ):
        delta = make_adapter(base, **changes).folder
        (delta / "adapter_config.json").write_text(json.dumps({"name": "task", "config": config}))
        refused(tmp_path, FormatError, text, base.folder, delta)


def test_weights_that_are_missing(make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base, head={"classifier.weight": T.of(noise(3, D))}).folder
    (delta / "head_config.json").unlink()
    refused(tmp_path, FormatError, "model_head.safetensors: a head without head_config.json", base.folder, delta)
    (delta / "adapter.safetensors").unlink()
    text = "adapter_config.json without weights; expected adapter.safetensors or pytorch_adapter.bin"
    refused(tmp_path, FormatError, text, base.folder, delta)


def test_an_adapter_whose_name_leaves_the_output(make_base, make_adapter, tmp_path):
    base = make_base()
    rest = {"bert.encoder.adapters.x": T.of([1.0])}
    delta = make_adapter(base, rest=rest, name="/etc").folder
    refused(tmp_path, FormatError, "adapter name '/etc' cannot be the name of a folder", base.folder, delta)


def test_outputs_that_would_do_harm(make_base, make_adapter, tmp_path):
    base = make_base().folder
    delta = make_adapter(make_base(name="twin"), folder="runs/run").folder
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    cases = [
        (base, "is the base itself"),
        (tmp_path / "link", "is the base itself"),
        (base / "out", "lies inside the base"),
        (tmp_path, "holds the base"),
        (delta, "is the delta itself"),
        (delta / "out", "lies inside the delta"),
        (tmp_path / "runs", "holds the delta"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "mine", "exists and was not written by a merge"),
    ]
    for output, text in cases:
        for overwrite in (False, True):
            refused(tmp_path, MergeError, text, base, delta, output, overwrite=overwrite)


def test_overwrite_replaces_an_earlier_merge(make_base, make_adapter, tmp_path):
    base = make_base().folder
    first = make_adapter(make_base(name="twin"), folder="first").folder
    second = make_adapter(make_base(name="triplet"), folder="second", ids=[1]).folder
    out = tmp_path / "out"
    merge_checkpoint(base, first, out)
    refused(tmp_path, MergeError, "exists from an earlier merge; replace it with --overwrite", base, second, out)
    merge_checkpoint(base, second, out, overwrite=True)
    assert json.loads((out / "pema_merge.json").read_bytes())["rows_merged"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "first", "out", "second", "triplet", "twin"]


def test_an_empty_folder_may_be_the_output(make_base, make_adapter, tmp_path):
    base = make_base()
    (tmp_path / "out").mkdir()
    merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_dry_run_writes_nothing(make_base, make_adapter, tmp_path):
    base = make_base()
    delta = make_adapter(base).folder
    before = snapshot(tmp_path)
    dry = merge_checkpoint(base.folder, delta, dry_run=True)
    assert snapshot(tmp_path) == before
    done = merge_checkpoint(base.folder, delta)
    assert dry.to_dict() == done.to_dict() | {"seconds": dry.seconds}


def test_a_full_disk_is_foreseen(make_base, make_adapter, tmp_path, monkeypatch):
    base = make_base()
    delta = make_adapter(base).folder
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 0, 10))
    refused(tmp_path, MergeError, "10 bytes free, but the merge takes", base.folder, delta)


def test_bases_that_are_not_there(make_base, make_adapter, tmp_path):
    delta = make_adapter(make_base()).folder
    refused(tmp_path, MergeError, "base /no/such/folder: no such folder, and not a Hub id", "/no/such/folder", delta)
    Path(tmp_path / "hollow").mkdir()
    refused(tmp_path, FormatError, "hollow: neither model.safetensors nor", tmp_path / "hollow", delta)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_file_system_that_holds_no_files(make_base, make_adapter):
    base = make_base()
    with pytest.raises(MergeError, match=r"^/proc/.*: No such file or directory; nothing was left behind"):
        merge_checkpoint(base.folder, make_adapter(base).folder, "/proc/x")


def test_a_tensor_that_the_index_does_not_name_stays_so(make_base, make_adapter):
    base = make_base(shards=2)
    path = base.folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["bert.pooler.dense.bias"]
    path.write_text(json.dumps(index))
    merge_checkpoint(base.folder, make_adapter(base).folder, base.folder.with_name("out"))
    assert json.loads((base.folder.with_name("out") / path.name).read_text())["weight_map"] == index["weight_map"]
