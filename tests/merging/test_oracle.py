"""Streamed merge == merge in memory, byte for byte, for every layout of a base and every kind of delta."""

import json

import pytest

from pema_adapters import merge_checkpoint
from pema_adapters.merging.report import MergeReport
from tests.merging.conftest import IDS, D, E, T, V, backbone, in_order, noise, oracle, read

HEAD = {"classifier.weight": T.of(noise(3, D, seed=3)), "classifier.bias": T.of(noise(3, seed=4))}
MATRIX = {dtype: backbone(dtype)[E] for dtype in ("F32", "BF16")}

LAYOUTS = {
    "one file": {},
    "shards": {"shards": 3},
    "no prefix": {"prefixed": False},
    "no prefix, shards": {"prefixed": False, "shards": 2},
    "gamma": {"legacy": True},
    "bfloat16": {"dtype": "BF16"},
    "float16": {"dtype": "F16"},
    "float64": {"dtype": "F64"},
    "stored twice": {"extra": {"cls.predictions.decoder.weight": MATRIX["F32"]}},
    "stored twice, shards": {"extra": {"lm_head.weight": MATRIX["F32"]}, "shards": 2},
    "stored twice, bfloat16": {"extra": {"lm_head.weight": MATRIX["BF16"]}, "dtype": "BF16"},
    "untied head": {"extra": {"lm_head.weight": T.of(noise(V, D, seed=9))}},
    "pickle": {"pickled": True},
    "pickle, shards": {"pickled": True, "shards": 3},
    "pickle, no prefix": {"pickled": True, "prefixed": False},
    "pickle, gamma, bfloat16": {"pickled": True, "legacy": True, "dtype": "BF16"},
    "pickle, tied": {"pickled": True, "tied": {"cls.predictions.decoder.weight": f"bert.{E}"}},
    "pickle, tied, shards": {"pickled": True, "tied": {"lm_head.weight": f"bert.{E}"}, "shards": 2},
}
DELTAS = {
    "rows": lambda adapter, full, base: adapter(base),
    "rows, own base": lambda adapter, full, base: adapter(base, prefix=""),
    "no rows": lambda adapter, full, base: adapter(base, ids=[]),
    "all rows": lambda adapter, full, base: adapter(base, ids=range(V)),
    "bfloat16 rows": lambda adapter, full, base: adapter(base, dtype="BF16"),
    "rows and head": lambda adapter, full, base: adapter(base, head=HEAD),
    "full": lambda adapter, full, base: full(base),
    "full, bfloat16": lambda adapter, full, base: full(base, dtype="BF16"),
    "full, own base": lambda adapter, full, base: full(base, own_base=True),
}


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_equals_in_memory(make_base, make_adapter, make_full, tmp_path, layout, delta):
    base = make_base(**LAYOUTS[layout])
    made = DELTAS[delta](make_adapter, make_full, base)
    report = merge_checkpoint(base.folder, made.folder, tmp_path / "out", verify=True)
    expected = oracle(base, made)
    assert read(tmp_path / "out") == expected
    if not base.shards:
        assert in_order(tmp_path / "out") == list(expected)
    assert report.rows_merged == len(made.ids)
    assert report.tensors_changed + report.tensors_copied == len(expected)


def test_what_no_delta_touches_keeps_its_order_file_and_metadata(make_base, make_adapter, tmp_path):
    base = make_base(shards=3)
    merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out")
    for path in base.folder.iterdir():
        merged = (tmp_path / "out" / path.name).read_bytes()
        holds_matrix = base.shards.get(base.embedding) == path.name
        assert (merged != path.read_bytes()) == holds_matrix
        assert len(merged) == path.stat().st_size


def test_a_new_head_comes_last_and_into_the_index(make_base, make_adapter, tmp_path):
    base = make_base(shards=2)
    merge_checkpoint(base.folder, make_adapter(base, head=HEAD).folder, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    before = json.loads((base.folder / "model.safetensors.index.json").read_bytes())
    last = "model-00002-of-00002.safetensors"
    assert index["weight_map"] == before["weight_map"] | dict.fromkeys(HEAD, last)
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"] + 4 * (3 * D + 3)


def test_the_names_get_the_prefix_where_a_head_needs_it(make_base, make_adapter, tmp_path):
    base = make_base(prefixed=False, shards=2)
    report = merge_checkpoint(base.folder, make_adapter(base, head=HEAD).folder, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == {f"bert.{name}" for name in base.tensors} | set(HEAD)
    assert any("prefix 'bert'" in note for note in report.notes)


def test_rounding_is_reported_also_by_a_dry_run(make_base, make_adapter, tmp_path):
    base = make_base(dtype="BF16")
    delta = make_adapter(base)
    rows = delta.rows.values
    expected = (rows - rows.bfloat16().float()).abs().max().item()
    dry = merge_checkpoint(base.folder, delta.folder, tmp_path / "out", dry_run=True)
    report = merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    assert dry.max_rounding_error == report.max_rounding_error == pytest.approx(expected, rel=1e-12)
    assert any("F32 weights were cast to the base's BF16" in note for note in report.notes)


def test_a_cast_that_the_user_asked_for_is_not_called_that_of_the_base(make_base, make_adapter, tmp_path):
    base = make_base()
    report = merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out", dtype="float16")
    assert "the delta's F32 weights were cast to F16" in report.notes


def test_config_of_a_static_head(make_base, make_adapter, tmp_path):
    base = make_base()
    merge_checkpoint(base.folder, make_adapter(base, head=HEAD).folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    before = json.loads((base.folder / "config.json").read_bytes())
    assert config == before | {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "no", "1": "yes", "2": "maybe"},
        "label2id": {"no": 0, "yes": 1, "maybe": 2},
    }


def test_config_of_full_fine_tuning(make_base, make_full, tmp_path):
    base = make_base(config={"id2label": {"0": "x"}, "label2id": {"x": 0}})
    delta = make_full(base, config={"problem_type": "regression", "dtype": "bfloat16", "vocab_size": 3})
    merge_checkpoint(base.folder, delta.folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["problem_type"] == "regression"
    assert "id2label" not in config  # the trained model has the default labels
    assert (config["dtype"], config["vocab_size"]) == ("float32", V)


def test_a_head_of_another_size_replaces_the_bases(make_base, make_adapter, tmp_path):
    base = make_base(extra={"classifier.weight": T.of(noise(2, D)), "classifier.bias": T.of(noise(2))}, shards=2)
    report = merge_checkpoint(base.folder, make_adapter(base, head=HEAD).folder, tmp_path / "out")
    assert {name: read(tmp_path / "out")[name] for name in HEAD} == HEAD
    assert "head classifier.weight: [3, 4] takes the place of [2, 4]" in report.notes


def test_untied_output_embeddings_are_left_alone(make_base, make_adapter, tmp_path):
    base = make_base(extra={"lm_head.weight": MATRIX["F32"]}, config={"tie_word_embeddings": False})
    merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out")
    assert read(tmp_path / "out")["lm_head.weight"] == MATRIX["F32"]


def test_copies_of_the_input_embedding_follow_even_then(make_base, make_adapter, tmp_path):
    base = make_base(extra={"decoder.embed_tokens.weight": MATRIX["F32"]}, config={"tie_word_embeddings": False})
    merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out")
    merged = read(tmp_path / "out")
    assert merged["decoder.embed_tokens.weight"] == merged[base.embedding] != MATRIX["F32"]


def test_a_grown_vocabulary(make_base, make_adapter, tmp_path):
    bias = T.of(noise(V, seed=6))
    extra = {"cls.predictions.bias": bias, "cls.predictions.decoder.weight": MATRIX["F32"]}
    base = make_base(extra=extra, shards=2)
    delta = make_adapter(base, ids=[*IDS, V, V + 1], vocab_size=V + 2)
    report = merge_checkpoint(base.folder, delta.folder, tmp_path / "out", verify=True)
    merged = read(tmp_path / "out")
    matrix = merged[base.embedding]
    assert matrix.shape == (V + 2, D)
    assert matrix.values[delta.ids].equal(delta.rows.values)
    assert merged["cls.predictions.decoder.weight"] == matrix
    assert merged["cls.predictions.bias"] == T("F32", (V + 2,), bias.data + bytes(8))
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["vocab_size"] == V + 2
    assert report.vocab_size == V + 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in merged.values())


def test_what_stays_an_adapter(make_base, make_adapter, tmp_path):
    rest = {"bert.encoder.layer.0.adapters.task.down": T.of(noise(1, D, seed=11))}
    flexible = {"heads.task.1.weight": T.of(noise(2, D, seed=12))}
    base = make_base()
    report = merge_checkpoint(base.folder, make_adapter(base, rest=rest, flexible=flexible).folder, tmp_path / "out")
    left = tmp_path / "out" / "adapters" / "task"
    assert report.adapters_left == ("task",)
    assert read(left) == rest | flexible
    config = json.loads((left / "adapter_config.json").read_bytes())
    assert config["config"] == {"architecture": None, "reduction_factor": 16}  # a union of one is that one
    assert config["name"] == "task"
    assert json.loads((left / "head_config.json").read_bytes())["model_class"] == "BertAdapterModel"


def test_nothing_stays_where_pema_was_all(make_base, make_adapter, tmp_path):
    base = make_base()
    report = merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out")
    assert report.adapters_left == ()
    assert not (tmp_path / "out" / "adapters").exists()


def test_the_files_of_the_output(make_base, make_adapter, tmp_path):
    base = make_base()
    for name in ("README.md", "vocab.txt", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", ".gitattributes",
                 "pytorch_model.bin.index.json", "modules.json"):  # fmt: skip
        (base.folder / name).write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "../base"}]')
    for name in ("onnx", "1_Pooling"):
        (base.folder / name).mkdir()
        (base.folder / name / "config.json").write_text("{}")
    merge_checkpoint(base.folder, make_adapter(base).folder, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {"README.md", "vocab.txt", "tokenizer.json", "modules.json", "1_Pooling/config.json"}
    assert found == expected | {"config.json", "model.safetensors", "pema_merge.json"}


def test_the_report_is_ready_for_json(make_base, make_adapter):
    base = make_base()
    delta = make_adapter(base)
    report = merge_checkpoint(str(base.folder), str(delta.folder))
    assert isinstance(report, MergeReport)
    assert report.output == str(delta.folder / "merged")
    written = json.loads((delta.folder / "merged" / "pema_merge.json").read_bytes())
    files = written.pop("files")
    assert written == json.loads(json.dumps(report.to_dict())) | {"seconds": written["seconds"], "version": 1}
    assert files.keys() == {p.name for p in (delta.folder / "merged").iterdir()} - {"pema_merge.json"}
    on_disk = sum(p.stat().st_size for p in (delta.folder / "merged").iterdir() if p.name != "pema_merge.json")
    assert report.bytes_written == on_disk
    assert (report.tensors_changed, report.tensors_copied, report.tensors_folded) == (1, 4, 0)
    assert (report.rows_merged, report.vocab_size, report.max_rounding_error) == (len(IDS), V, 0.0)
