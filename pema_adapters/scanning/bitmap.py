"""Record which of V ids occur in the data, one bit each, and how their number grows with the tokens read."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pema_adapters.scanning.values import Integers

BLOCK_SIZE = 1 << 17  # ids per block: 1 MB as int64, so that the range check finds the block in the CPU cache
POINT_RATIO = 10**0.1  # ratio of tokens between two points of a growth curve: ten points per decade

PackedBits = npt.NDArray[np.uint8]  # one bit per id, as np.packbits writes them


class Bitmap:
    """The ids seen so far, and the number of tokens marked.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self.seen: npt.NDArray[np.bool_] = np.zeros(vocab_size, dtype=np.bool_)
        self.tokens = 0
        self.tokens_before = 0  # of `tokens`, those that earlier bitmaps count
        self._index = np.empty(BLOCK_SIZE, dtype=np.intp)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.seen)

    def mark(self, ids: Integers, skip_negative: bool) -> int | None:
        """Mark ids, block by block, up to the first block with an id outside [0, V).

        Args:
            ids: integers of any type, [n].
            skip_negative: skip negative ids; otherwise they are out of range.

        Returns:
            The first id out of range, or None.
        """
        for start in range(0, len(ids), BLOCK_SIZE):
            block = ids[start : start + BLOCK_SIZE]
            if skip_negative and not self._is_in_range(block):
                block = block[block >= 0]
            try:  # mark, then check: faster, because the check finds the block in the CPU cache
                self.seen[self._to_index(block)] = True
            except IndexError:
                return self._find_out_of_range(block)
            if not self._is_in_range(block):  # NumPy counts negative ids from the end
                return self._find_out_of_range(block)
            self.tokens += len(block)
        return None

    def count_distinct(self) -> int:
        """Return K, the number of ids seen."""
        return int(np.count_nonzero(self.seen))

    def fork(self, tokens: int) -> "Bitmap":
        """Return an empty bitmap for later data, which start `tokens` tokens after the last one marked here.

        Forks can be filled in parallel; `merge` them in the order of their data.
        """
        bitmap = Bitmap(self.vocab_size)
        bitmap.tokens = bitmap.tokens_before = self.tokens + tokens
        return bitmap

    def merge(self, fork: "Bitmap") -> None:
        """Add the ids of a fork, as if they had been marked here."""
        self.seen |= fork.seen
        self.tokens += fork.tokens - fork.tokens_before

    def _find_out_of_range(self, block: Integers) -> int:
        return int(block[(block < 0) | (block >= self.vocab_size)][0])

    def _to_index(self, block: Integers) -> npt.NDArray[np.intp]:
        """Cast a block to NumPy's index type in a reused buffer, which is faster than NumPy's own cast."""
        index = self._index[: len(block)]
        if block.dtype == index.dtype:
            return block.view(index.dtype)
        index[...] = block
        return index

    def _is_in_range(self, block: Integers) -> bool:
        """Check both bounds in one pass: viewed as unsigned, a negative id is larger than any V."""
        return not block.size or int(block.view(f"u{block.itemsize}").max()) < self.vocab_size


@dataclass(frozen=True)
class BitmapState:
    """A snapshot of a `GrowingBitmap`."""

    seen: PackedBits
    tokens: int
    points: tuple[tuple[int, int], ...]


class GrowingBitmap(Bitmap):
    """A bitmap that also counts the distinct ids each time the tokens have grown by POINT_RATIO."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self._points: list[tuple[int, int]] = []
        self._next = 1  # tokens at the next point

    def mark(self, ids: Integers, skip_negative: bool) -> int | None:
        """Mark ids as `Bitmap.mark` does; the points do not depend on how the ids are split between calls."""
        start = 0
        while start < len(ids):
            part = ids[start : start + self._next - self.tokens]
            if (token_id := super().mark(part, skip_negative)) is not None:
                return token_id
            start += len(part)
            if self.tokens == self._next:
                self._add_point()
        return None

    @property
    def growth(self) -> tuple[tuple[int, int], ...]:
        """Pairs (tokens, distinct ids among them), increasing; the last one is the current state."""
        last = (self.tokens, self.count_distinct())
        return (*self._points, *([last] if self.tokens and self._points[-1] != last else []))

    def fork(self, tokens: int) -> "GrowingBitmap":
        """Fork as `Bitmap.fork` does; the fork keeps its bits at each point for `merge` to count."""
        bitmap = _ForkedBitmap(self.vocab_size)
        bitmap.tokens = bitmap.tokens_before = self.tokens + tokens
        bitmap._next = self._next
        while bitmap._next <= bitmap.tokens:
            bitmap._next = _next_point(bitmap._next)
        return bitmap

    def merge(self, fork: Bitmap) -> None:
        """Add the ids and the points of a fork."""
        if isinstance(fork, _ForkedBitmap):
            for tokens, bits in fork.bits_at_points:
                seen = self.seen | _unpack_bits(bits, self.vocab_size)
                self._points.append((tokens, int(np.count_nonzero(seen))))
            self._next = fork._next
        super().merge(fork)

    def snapshot(self) -> BitmapState:
        """Return a copy of the state for `restore`."""
        return BitmapState(np.packbits(self.seen), self.tokens, tuple(self._points))

    def restore(self, state: BitmapState) -> None:
        """Replace the state by a snapshot of a bitmap of the same V."""
        self.seen[:] = _unpack_bits(state.seen, self.vocab_size)
        self.tokens, self._points = state.tokens, list(state.points)
        self._next = _next_point(self._points[-1][0]) if self._points else 1

    def _add_point(self) -> None:
        self._points.append((self.tokens, self.count_distinct()))
        self._next = _next_point(self.tokens)


class _ForkedBitmap(GrowingBitmap):
    """Keeps its bits at each point, because only the parent knows the ids before them."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.bits_at_points: list[tuple[int, PackedBits]] = []

    def _add_point(self) -> None:
        self.bits_at_points.append((self.tokens, np.packbits(self.seen)))
        self._next = _next_point(self.tokens)


def _next_point(tokens: int) -> int:
    """Return the tokens at the point after one at `tokens`."""
    return max(tokens + 1, round(tokens * POINT_RATIO))


def _unpack_bits(bits: PackedBits, count: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(bits, count=count).view(np.bool_)
