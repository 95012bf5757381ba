"""Damaged Arrow and Parquet files are refused in one line that names them: no crash, no wrong vocabulary."""

import re
import subprocess
import sys

import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value, load_dataset, load_from_disk

from pema_adapters import PartialVocabulary, PEMAConfig, shrink_embeddings
from pema_adapters.errors import FormatError, VocabularyError
from pema_adapters.scanning.text_columns import Encoder
from pema_adapters.scanning.text_scanner import scan_text
from tests.paths import TOOLS

V = 1_000


def ids_of(data, **options):
    return PartialVocabulary.from_dataset(data, vocab_size=V, **options).token_ids.tolist()


def with_buffers(offsets, values, nulls=None, null_count=0):
    """Make a data set of one column with arbitrary buffers."""
    items = pa.array(values, pa.int32())
    buffers = [nulls, pa.array(offsets, pa.int32()).buffers()[1]]
    array = pa.ListArray.from_buffers(pa.list_(pa.int32()), len(offsets) - 1, buffers, null_count, children=[items])
    return Dataset(pa.table({"input_ids": array}), fingerprint="x")


BAD = {
    "offsets that decrease": lambda: with_buffers([0, 3, 1, 4], [1, 2, 3, 4]),
    "offsets behind the values": lambda: with_buffers([0, 900, 4], [1, 2, 3, 4]),
    "negative offsets": lambda: with_buffers([0, -900, 4], [1, 2, 3, 4]),
    "a wrong number of nulls": lambda: with_buffers([0, 2, 4], [1, 2, 3, 4], pa.py_buffer(b"\x01"), null_count=2),
}


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("kind", BAD)
def test_invalid_buffers_are_refused(kind, num_proc):
    with pytest.raises(
        FormatError, match=r"^data, column 'input_ids': damaged Arrow data: .*; write the data set again"
    ):
        ids_of(BAD[kind](), num_proc=num_proc)


def test_shrink_embeddings_refuses_invalid_buffers(case):
    model = case.with_adapters()
    model.add_adapter("task", config=PEMAConfig())
    with pytest.raises(FormatError, match="column 'input_ids': damaged Arrow data"):
        shrink_embeddings(model, "task", BAD["offsets behind the values"]())


def test_columns_of_text_are_validated_before_tokenizing():
    text = pa.StringArray.from_buffers(2, pa.array([0, 900, 4], pa.int32()).buffers()[1], pa.py_buffer(b"abcd"))
    with pytest.raises(FormatError, match="text, column 'text': damaged Arrow data"):
        scan_text(Dataset(pa.table({"text": text}), fingerprint="x"), Encoder(None), vocab_size=V)


def test_an_indices_mapping_out_of_range_is_refused():
    data = Dataset.from_dict({"input_ids": [[1], [2]]})
    picked = Dataset(data.data, indices_table=pa.table({"indices": pa.array([0, 7], pa.uint64())}), fingerprint="x")
    with pytest.raises(FormatError, match="the indices mapping picks row 7 of a table of 2 rows"):
        ids_of(picked)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Return the folder and the only Arrow file of a saved data set in five batches."""
    monkeypatch.setattr("datasets.config.DEFAULT_MAX_BATCH_SIZE", 2)
    features = Features({"input_ids": List(Value("int32"))})
    Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(10)]}, features=features).save_to_disk(
        tmp_path / "saved"
    )
    return tmp_path / "saved", next((tmp_path / "saved").glob("*.arrow"))


def test_a_file_truncated_between_batches_is_refused(saved):
    """Arrow reads it without an error. Complete files are read, and files of other writers without an end mark."""
    folder, file = saved
    assert ids_of(load_from_disk(folder)) == list(range(11))
    starts = [at.start() for at in re.finditer(b"\xff\xff\xff\xff", file.read_bytes())]
    whole, cut = file.read_bytes(), file.read_bytes()[: starts[3]]
    file.write_bytes(cut)
    with pytest.raises(FormatError, match=re.escape(f"{file}: damaged: the Arrow stream does not end where the file")):
        ids_of(load_from_disk(folder))
    ends_early = bytearray(whole)
    ends_early[starts[3] + 4 : starts[3] + 8] = bytes(4)
    file.write_bytes(ends_early)
    with pytest.raises(FormatError, match="does not end where the file ends"):
        ids_of(load_from_disk(folder))
    (folder / "by_others").mkdir()
    (folder / "by_others" / "x.arrow").write_bytes(cut)
    assert ids_of(Dataset.from_file(str(folder / "by_others" / "x.arrow"))) == list(range(5))


def test_a_damaged_file_of_a_stream_is_refused(tmp_path):
    file = tmp_path / "x.parquet"
    Dataset.from_dict({"input_ids": [[i % V] * 50 for i in range(3_000)]}).to_parquet(file)
    content = bytearray(file.read_bytes())
    content[40:400] = bytes(360)
    file.write_bytes(content)
    stream = load_dataset("parquet", data_files=[str(file)], split="train", streaming=True)
    with pytest.raises(FormatError, match=r"^data: cannot be read as a data set: ") as caught:
        ids_of(stream)
    assert "\n" not in str(caught.value)


def test_ids_out_of_range_are_named_by_row():
    with pytest.raises(VocabularyError, match="row 1: token id 1000 is outside"):
        ids_of(with_buffers([0, 1, 2], [1, 1000]))


@pytest.mark.slow
def test_random_damage_is_refused():
    """Run a part of tools/fuzz_arrow.py: two formats, six kinds of columns, three ways to read them."""
    command = [sys.executable, TOOLS / "fuzz_arrow.py", "--mutations", "252"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Parquet, pema-scan" in done.stdout
