"""One bit for each of the V rows: which ids were seen, and how their number grew."""

import numpy as np
import numpy.typing as npt

from pema_adapters.reading.values import Integers

BLOCK = 1 << 17  # ids marked at a time: 1 MB as int64, so that the check finds them in the cache
POINT_RATIO = 10**0.1  # from one point of a growth curve to the next: ten for each power of ten


class Bitmap:
    """Which of V ids were seen, and how many tokens went in."""

    def __init__(self, vocab_size: int) -> None:
        self.seen: npt.NDArray[np.bool_] = np.zeros(vocab_size, dtype=np.bool_)
        self.tokens = 0
        self._index = np.empty(BLOCK, dtype=np.intp)

    def mark(self, ids: Integers, skip_negative: bool) -> int | None:
        """Mark 1-D ids of any integer type; at the first block with an id outside [0, V), return that id.

        Marking comes before checking: it waits less for memory, and the check then finds the block in the cache.
        """
        for start in range(0, len(ids), BLOCK):
            block = ids[start : start + BLOCK]
            if skip_negative and not self._fits(block):
                block = block[block >= 0]
            try:
                self.seen[self._as_index(block)] = True
            except IndexError:
                return self._first_wrong(block)
            if not self._fits(block):  # NumPy counts negative ids from the end
                return self._first_wrong(block)
            self.tokens += len(block)
        return None

    def _first_wrong(self, block: Integers) -> int:
        return int(block[(block < 0) | (block >= len(self.seen))][0])

    def _as_index(self, block: Integers) -> npt.NDArray[np.intp]:
        """The block in NumPy's own index type: cast within the cache, faster than leaving the cast to NumPy."""
        index = self._index[: len(block)]
        if block.dtype == index.dtype:
            return block.view(index.dtype)
        index[...] = block
        return index

    def _fits(self, block: Integers) -> bool:
        """One pass for both bounds: read as unsigned, a negative number is larger than any V."""
        return not block.size or int(block.view(f"u{block.itemsize}").max()) < len(self.seen)


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
        at_the_end = (self.tokens, self._distinct())
        return (*self._points, *([at_the_end] if self.tokens and self._points[-1] != at_the_end else []))

    def _add_point(self) -> None:
        self._points.append((self.tokens, self._distinct()))
        self._next = max(self.tokens + 1, round(self.tokens * POINT_RATIO))

    def _distinct(self) -> int:
        return int(np.count_nonzero(self.seen))
