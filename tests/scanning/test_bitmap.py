"""Forked and restored bitmaps equal one bitmap that has marked all ids."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pema_adapters.scanning.bitmap import Bitmap, GrowingBitmap

V = 31
parts_of_ids = st.lists(st.lists(st.integers(0, V - 1), max_size=60), max_size=8)


def mark_all(kind, parts):
    bitmap = kind(V)
    for part in parts:
        assert bitmap.mark(np.array(part, np.int64), skip_negative=False) is None
    return bitmap


def describe(bitmap):
    return bitmap.seen.tolist(), bitmap.tokens, bitmap.growth if isinstance(bitmap, GrowingBitmap) else None


@given(parts_of_ids, st.integers(1, 3), st.sampled_from([Bitmap, GrowingBitmap]))
def test_merged_forks_equal_one_bitmap(parts, count, kind):
    """Groups of forks, filled in reverse order and merged in order."""
    bitmap = kind(V)
    for start in range(0, len(parts), count):
        group, forks, tokens = parts[start : start + count], [], 0
        for part in group:
            forks.append(bitmap.fork(tokens))
            tokens += len(part)
        for one, part in reversed([*zip(forks, group, strict=True)]):
            assert one.mark(np.array(part, np.int64), skip_negative=False) is None
        for one in forks:
            bitmap.merge(one)
    assert describe(bitmap) == describe(mark_all(kind, parts))


@given(parts_of_ids)
def test_restored_snapshots_equal_one_bitmap(parts):
    bitmap = GrowingBitmap(V)
    for part in parts:
        state, bitmap = bitmap.snapshot(), GrowingBitmap(V)
        bitmap.restore(state)
        assert bitmap.mark(np.array(part, np.int64), skip_negative=False) is None
    assert describe(bitmap) == describe(mark_all(GrowingBitmap, parts))


def test_a_snapshot_does_not_change_with_the_bitmap():
    bitmap = mark_all(GrowingBitmap, [[1, 2]])
    state = bitmap.snapshot()
    assert bitmap.mark(np.array([3, 4]), skip_negative=False) is None
    assert np.flatnonzero(np.unpackbits(state.seen, count=V)).tolist() == [1, 2]
    assert (state.tokens, state.points) == (2, ((1, 1), (2, 2)))
