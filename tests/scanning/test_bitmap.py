"""Bitmaps filled in parts, and put to rest between: as if one had seen it all."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pema_adapters.scanning.bitmap import Bitmap, GrowingBitmap

V = 31
parts_of_ids = st.lists(st.lists(st.integers(0, V - 1), max_size=60), max_size=8)


def whole(kind, parts):
    bitmap = kind(V)
    for part in parts:
        assert bitmap.mark(np.array(part, np.int64), skip_negative=False) is None
    return bitmap


def facts(bitmap):
    return bitmap.seen.tolist(), bitmap.tokens, bitmap.growth if isinstance(bitmap, GrowingBitmap) else None


@given(parts_of_ids, st.integers(1, 3), st.sampled_from([Bitmap, GrowingBitmap]))
def test_parts_that_join(parts, count, kind):
    """Parts begun together and filled in any order, several times over."""
    bitmap = kind(V)
    for start in range(0, len(parts), count):
        group, begun, tokens = parts[start : start + count], [], 0
        for part in group:
            begun.append(bitmap.fork(tokens))
            tokens += len(part)
        for one, part in reversed([*zip(begun, group, strict=True)]):
            assert one.mark(np.array(part, np.int64), skip_negative=False) is None
        for one in begun:
            bitmap.merge(one)
    assert facts(bitmap) == facts(whole(kind, parts))


@given(parts_of_ids)
def test_a_bitmap_that_rests_between_parts(parts):
    bitmap = GrowingBitmap(V)
    for part in parts:
        state, bitmap = bitmap.snapshot(), GrowingBitmap(V)
        bitmap.restore(state)
        assert bitmap.mark(np.array(part, np.int64), skip_negative=False) is None
    assert facts(bitmap) == facts(whole(GrowingBitmap, parts))


def test_a_state_stays_as_it_was():
    bitmap = whole(GrowingBitmap, [[1, 2]])
    state = bitmap.snapshot()
    assert bitmap.mark(np.array([3, 4]), skip_negative=False) is None
    assert np.flatnonzero(np.unpackbits(state.seen, count=V)).tolist() == [1, 2]
    assert (state.tokens, state.points) == (2, ((1, 1), (2, 2)))
