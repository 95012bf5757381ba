"""The tensors of an output file, and the header that tells where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.safetensors_header import encode_header
from pema_adapters.merging.plan.segments import BLOCK, BytesSegment, CopySegment, Segment


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output, and the segments that its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


def plan_header(base: Checkpoint, path: Path, entries: Sequence[OutputTensor], start: int | None) -> Segment:
    """Return the header of what the base's file `path` becomes: that file's own if it says the same.

    start: where the tensors have to begin; if None, or too early, they keep their place within a block, so that blocks
    can be cloned.
    """
    same = _same_header(base, path, entries)
    if same is not None:
        return same
    header = encode_file_header(base, path, entries)
    if start is not None and start >= len(header):
        return BytesSegment(encode_file_header(base, path, entries, start - len(header)))
    first = min((tensor.start or 0 for tensor in base.by_file.get(path, ())), default=0)
    return BytesSegment(
        encode_file_header(base, path, entries, (first - len(header)) % BLOCK if first and first % 8 == 0 else 0)
    )


def encode_file_header(base: Checkpoint, path: Path, entries: Sequence[OutputTensor], padding: int = 0) -> bytes:
    """Encode a new header, with the metadata that the file has in the base."""
    tensors = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    return encode_header(tensors, base.metadata(path), padding)


def _same_header(base: Checkpoint, path: Path, entries: Sequence[OutputTensor]) -> CopySegment | None:
    """Return the header of a base's file if that of the output says the same."""
    header = base.headers.get(path)
    if header is None:
        return None
    before = [(tensor.name, tensor.dtype, tensor.shape) for tensor in header.tensors.values()]
    after = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    return CopySegment(header.source, 0, header.data_start) if after == before else None
