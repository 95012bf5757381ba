import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema_adapters.errors import MergeError
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.io.input_file import InputFile
from pema_adapters.merging.plan import plan, segments
from pema_adapters.merging.plan.dtype_cast import Rounding, cast
from pema_adapters.merging.plan.plan import PlannedFile
from pema_adapters.merging.plan.segments import BytesSegment, CastSegment, CopySegment, RowsSegment, merge_segments


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "source"
    path.write_bytes(bytes(range(256)))
    return InputFile(path)


def rows_over(file):
    """Rows 1, 2 and 4 of a 5 x 3 matrix, and a row 5 that makes it grow."""
    return RowsSegment(CopySegment(file, 100, 15), BytesSegment(b"aaabbbcccddd"), np.array([1, 2, 4, 5]), 3)


def test_rows_by_hand(source):
    segment = rows_over(source)
    assert segment.length == 18
    assert segment.read(0, 18) == b"defaaabbbmnocccddd"  # chr(100) is "d"
    assert list(segment.changes()) == [(3, b"aaabbb"), (12, b"cccddd")]


@given(begin=st.integers(0, 18), end=st.integers(0, 18))
def test_rows_give_any_range(source, begin, end):
    begin, end = sorted((begin, end))
    assert rows_over(source).read(begin, end) == b"defaaabbbmnocccddd"[begin:end]


def test_runs_are_bounded_by_the_chunk(source, monkeypatch):
    monkeypatch.setattr(segments, "CHUNK", 4)
    assert list(rows_over(source).changes()) == [(3, b"aaa"), (6, b"bbb"), (12, b"ccc"), (15, b"ddd")]


@given(begin=st.integers(0, 60), end=st.integers(0, 60), chunk=st.integers(1, 60))
def test_a_file_gives_any_range_whatever_the_segments(source, begin, end, chunk):
    halves = StoredTensor("x", "F32", (2, 2), source, None, 16, np.array([1, 2, 3, 4], "<f4").view(np.uint8))
    parts = [
        BytesSegment(b"head"),
        BytesSegment(b""),
        rows_over(source),
        CopySegment(source, 0, 7),
        CastSegment.of(halves, "F16", Rounding()),
    ]
    whole = b"head" + b"defaaabbbmnocccddd" + bytes(range(7)) + np.array([1, 2, 3, 4], "<f2").tobytes()
    file = PlannedFile("x", tuple(parts))
    begin, end = sorted((begin, end))
    assert file.size == len(whole)
    assert file.read(begin, end) == whole[begin:end]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "CHUNK", chunk)
        assert b"".join(part for _, part in file.chunks()) == whole


def test_copies_that_continue_each_other_become_one(source):
    parts = [
        CopySegment(source, 0, 4),
        CopySegment(source, 4, 2),
        BytesSegment(b""),
        CopySegment(source, 6, 1),
        CopySegment(source, 9, 1),
    ]
    assert merge_segments(parts) == (CopySegment(source, 0, 7), CopySegment(source, 9, 1))


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@given(
    values=st.lists(st.floats(-6e4, 6e4) | st.sampled_from([float("nan"), float("inf"), -0.0, 1e-40, 6e4]), min_size=1)
)
def test_casts_are_those_of_torch(dtype, target, values):
    given_values = torch.tensor(values, dtype=torch.float64).to(FLOATS[dtype])
    expected = given_values.to(FLOATS[target])
    rounding = Rounding()
    made = cast(given_values.view(torch.uint8).numpy(), dtype, target, rounding, "x")
    assert torch.frombuffer(bytearray(made.tobytes()), dtype=FLOATS[target]).equal(expected) or expected.isnan().any()
    kept = torch.frombuffer(bytearray(made.tobytes()), dtype=FLOATS[target])
    torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)
    finite = given_values.isfinite()
    moved = (given_values.double() - expected.double())[finite].abs()
    assert rounding.largest == (moved.max().item() if len(moved) else 0.0)


def test_a_cast_that_overflows_is_refused():
    raw = np.array([1.0, -7e4], "<f4").view(np.uint8)
    with pytest.raises(MergeError, match="here: a value of 70000 is too large for the dtype F16"):
        cast(raw, "F32", "F16", Rounding(), "here")
