"""One bit for each of the V rows: which ids were seen, and how their number grew."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pema_adapters.scanning.values import Integers

BLOCK_SIZE = 1 << 17  # ids marked at a time: 1 MB as int64, so that the check finds them in the cache
POINT_RATIO = 10**0.1  # from one point of a growth curve to the next: ten for each power of ten

PackedBits = npt.NDArray[np.uint8]  # a bit for each id, np.packbits


class Bitmap:
    """Which of V ids were seen, and how many tokens went in."""

    def __init__(self, vocab_size: int) -> None:
        self.seen: npt.NDArray[np.bool_] = np.zeros(vocab_size, dtype=np.bool_)
        self.tokens = 0
        self.before = 0  # of the tokens, those that other bitmaps count
        self._index = np.empty(BLOCK_SIZE, dtype=np.intp)

    def mark(self, ids: Integers, skip_negative: bool) -> int | None:
        """Mark 1-D ids of any integer type; at the first block with an id outside [0, V), return that id.

        Marking comes before checking: it waits less for memory, and the check then finds the block in the cache.
        """
        for start in range(0, len(ids), BLOCK_SIZE):
            block = ids[start : start + BLOCK_SIZE]
            if skip_negative and not self._is_in_range(block):
                block = block[block >= 0]
            try:
                self.seen[self._to_index(block)] = True
            except IndexError:
                return self._find_out_of_range(block)
            if not self._is_in_range(block):  # NumPy counts negative ids from the end
                return self._find_out_of_range(block)
            self.tokens += len(block)
        return None

    def count_distinct(self) -> int:
        """K so far."""
        return int(np.count_nonzero(self.seen))

    def fork(self, tokens: int) -> "Bitmap":
        """An empty bitmap for later data, so many tokens behind the end of this one; `merge` them in order."""
        bitmap = Bitmap(len(self.seen))
        bitmap.tokens = bitmap.before = self.tokens + tokens
        return bitmap

    def merge(self, part: "Bitmap") -> None:
        """Take over what a forked bitmap has seen, as if its ids had been marked here."""
        self.seen |= part.seen
        self.tokens += part.tokens - part.before

    def _find_out_of_range(self, block: Integers) -> int:
        return int(block[(block < 0) | (block >= len(self.seen))][0])

    def _to_index(self, block: Integers) -> npt.NDArray[np.intp]:
        """The block in NumPy's own index type: cast within the cache, faster than leaving the cast to NumPy."""
        index = self._index[: len(block)]
        if block.dtype == index.dtype:
            return block.view(index.dtype)
        index[...] = block
        return index

    def _is_in_range(self, block: Integers) -> bool:
        """One pass for both bounds: read as unsigned, a negative number is larger than any V."""
        return not block.size or int(block.view(f"u{block.itemsize}").max()) < len(self.seen)


@dataclass(frozen=True)
class BitmapState:
    """A `GrowingBitmap` at rest: what it takes to go on."""

    seen: PackedBits
    tokens: int
    points: tuple[tuple[int, int], ...]


class GrowingBitmap(Bitmap):
    """A bitmap that also counts the distinct ids, whenever the tokens have grown by POINT_RATIO."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self._points: list[tuple[int, int]] = []
        self._next = 1  # tokens at the next point

    def mark(self, ids: Integers, skip_negative: bool) -> int | None:
        """As `Bitmap.mark`; ids are cut where a point is due, so that a point is the same however they come."""
        start = 0
        while start < len(ids):
            part = ids[start : start + self._next - self.tokens]
            if (wrong := super().mark(part, skip_negative)) is not None:
                return wrong
            start += len(part)
            if self.tokens == self._next:
                self._add_point()
        return None

    def growth(self) -> tuple[tuple[int, int], ...]:
        """Pairs (tokens, distinct ids among them), increasing; the last is what there is now."""
        at_the_end = (self.tokens, self.count_distinct())
        return (*self._points, *([at_the_end] if self.tokens and self._points[-1] != at_the_end else []))

    def fork(self, tokens: int) -> "GrowingBitmap":
        """As `Bitmap.fork`; it keeps what was seen at its points, for `merge` to count."""
        bitmap = _ForkedBitmap(len(self.seen))
        bitmap.tokens = bitmap.before = self.tokens + tokens
        bitmap._next = self._next
        while bitmap._next <= bitmap.tokens:
            bitmap._next = _next_point(bitmap._next)
        return bitmap

    def merge(self, part: Bitmap) -> None:
        """As `Bitmap.merge`, with the points on the way."""
        if isinstance(part, _ForkedBitmap):
            for tokens, seen in part.snapshots:
                self._points.append((tokens, int(np.count_nonzero(self.seen | _unpack_bits(seen, len(self.seen))))))
            self._next = part._next
        super().merge(part)

    def snapshot(self) -> BitmapState:
        """A copy to go on from."""
        return BitmapState(np.packbits(self.seen), self.tokens, tuple(self._points))

    def restore(self, state: BitmapState) -> None:
        """Go on from a copy; a bitmap of the same V."""
        self.seen[:] = _unpack_bits(state.seen, len(self.seen))
        self.tokens, self._points = state.tokens, list(state.points)
        self._next = _next_point(self._points[-1][0]) if self._points else 1

    def _add_point(self) -> None:
        self._points.append((self.tokens, self.count_distinct()))
        self._next = _next_point(self.tokens)


class _ForkedBitmap(GrowingBitmap):
    """Keeps all that was seen at its points, where its parent counts."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.snapshots: list[tuple[int, PackedBits]] = []

    def _add_point(self) -> None:
        self.snapshots.append((self.tokens, np.packbits(self.seen)))
        self._next = _next_point(self.tokens)


def _next_point(tokens: int) -> int:
    """Where the point after one at `tokens` is."""
    return max(tokens + 1, round(tokens * POINT_RATIO))


def _unpack_bits(bits: PackedBits, count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(bits, count=count).view(np.bool_)
