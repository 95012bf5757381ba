"""Fingerprints: what an artifact records of its base, so that it is never merged into another one."""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Protocol

import numpy as np

from pema_adapters.errors import BaseMismatchError, FormatError
from pema_adapters.formats.tensor_names import canonicalize, map_canonical_names
from pema_adapters.formats.versions import UNVERSIONED, check_version

VERSION = 1
SAMPLES = 64
BLOCK_ROWS = 1024


class TensorSource(Protocol):
    """A checkpoint on disk or a model in memory, whose fingerprint can be computed."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor by stored name."""

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Gather the rows `ids` (n of them) as float32 [n, d]."""

    def values(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Gather the values at n flat `positions` as float32 [n]."""


@dataclass(frozen=True)
class Fingerprint:
    """Digests of all K base rows, and of name, shape and sampled values of every other tensor of the base.

    Numbers are digested as little-endian float32, so that a base saved again in a wider dtype still matches. All names
    are canonical (see `tensor_names`).

    Attributes:
        embedding: The name of E.
        prefix: The base model's prefix, "bert" for example.
        vocab_size: V of the trained model.
        base_vocab_size: V of the base. Ids from there on are rows that `resize_token_embeddings` added; the base lacks
            them, and `rows` does not cover them.
        rows: The digest of the base rows of the trained tokens.
        tensors: `{name: (shape, digest)}` of the other tensors.
        untied: The name of the output matrix that the trained model no longer ties to E, though the base does; "" for
            none.
        base: The Hub id or folder that the model was loaded from, as its user gave it; "" if unknown.
    """

    embedding: str
    prefix: str
    vocab_size: int
    base_vocab_size: int
    rows: str
    tensors: dict[str, tuple[tuple[int, ...], str]]
    untied: str = ""
    base: str = ""

    @classmethod
    def compute(  # noqa: PLR0913 - the parts of a fingerprint
        cls,
        source: TensorSource,
        *,
        embedding: str,
        prefix: str,
        vocab_size: int,
        token_ids: np.ndarray,
        names: Collection[str],
    ) -> "Fingerprint":
        """Compute the fingerprint of a base.

        Args:
            source: The base.
            embedding: The stored name of E.
            prefix: The base model's prefix.
            vocab_size: V of the trained model.
            token_ids: The ids of the trained rows, int64 [K].
            names: The stored names of the other tensors to cover.
        """
        shapes = source.shapes()
        base_vocab_size = shapes[embedding][0]
        return cls(
            embedding=canonicalize(embedding, prefix),
            prefix=prefix,
            vocab_size=vocab_size,
            base_vocab_size=base_vocab_size,
            rows=digest_rows(partial(source.rows, embedding), token_ids[token_ids < base_vocab_size]),
            tensors={
                canonicalize(name, prefix): (shapes[name], _digest_values(source, name, shapes[name])) for name in names
            },
        )

    def match_names(self, names: Collection[str]) -> dict[str, str]:
        """Return `{canonical name: stored name}` of a base, whatever prefix it is stored under."""
        found = map_canonical_names(names, self.prefix)
        if self.embedding not in found:
            prefixes = {
                name.removesuffix("." + self.embedding) for name in names if name.endswith("." + self.embedding)
            }
            if len(prefixes) == 1:
                return map_canonical_names(names, prefixes.pop())
        return found

    def check(self, source: TensorSource, token_ids: np.ndarray, *, where: str) -> None:
        """Check that `source` is the base of this fingerprint.

        Args:
            source: The checkpoint or model to check.
            token_ids: The ids of the trained rows, int64 [K].
            where: How messages name `source`.

        Raises:
            BaseMismatchError: A tensor is missing or differs; the message names the first.
        """
        shapes = source.shapes()
        stored = self.match_names(shapes.keys())
        embedding = self._require_name(stored, self.embedding, where)
        if shapes[embedding][:1] != (self.base_vocab_size,):
            rows = shapes[embedding][0] if shapes[embedding] else "no"
            raise BaseMismatchError(f"{where}: tensor {embedding!r} has {rows} rows, expected {self.base_vocab_size}")
        for key, (shape, digest) in self.tensors.items():
            name = self._require_name(stored, key, where)
            if shapes[name] != shape:
                found = f"shape {list(shapes[name])}, expected {list(shape)}"
                raise BaseMismatchError(f"{where}: tensor {name!r} has {found}")
            if (found := _digest_readable(where, name, partial(_digest_values, source, name, shape))) != digest:
                raise _mismatch_error(where, name, "sampled values", found, digest)
        old = token_ids[token_ids < self.base_vocab_size]
        found = _digest_readable(where, embedding, partial(digest_rows, partial(source.rows, embedding), old))
        if found != self.rows:
            raise _mismatch_error(where, embedding, "rows of the delta's tokens", found[:16], self.rows[:16])

    def to_array(self) -> np.ndarray:
        """Return the fingerprint as UTF-8 JSON, uint8 [n], the tensor that artifacts hold."""
        content = {"version": VERSION, **asdict(self)}
        return np.frombuffer(json.dumps(content, separators=(",", ":")).encode(), dtype=np.uint8)

    @classmethod
    def from_array(cls, array: np.ndarray) -> "Fingerprint":
        """Read the output of `to_array`, of this or an older version.

        Raises:
            FormatError: The fingerprint is damaged, or written by a newer version.
        """
        try:
            content = json.loads(np.asarray(array, dtype=np.uint8).tobytes())
            version = content.get("version", UNVERSIONED)
        except (ValueError, AttributeError, RecursionError) as error:
            raise _unreadable_error(error) from None
        check_version(version, VERSION)
        try:
            found = {field.name: content[field.name] for field in fields(cls) if field.name in content}
            fingerprint = cls(**found)
            tensors = {name: (tuple(shape), digest) for name, (shape, digest) in fingerprint.tensors.items()}
            fingerprint = cls(**{**found, "tensors": tensors})
        except (ValueError, TypeError, AttributeError) as error:
            raise _unreadable_error(error) from None
        return _validate(fingerprint)

    @staticmethod
    def _require_name(stored: Mapping[str, str], key: str, where: str) -> str:
        if key not in stored:
            raise BaseMismatchError(
                f"{where}: no tensor {key!r}, which the trained model has (if from_pretrained newly initialized it, "
                "save that model with save_pretrained and train on the result)"
            )
        return stored[key]


def _unreadable_error(error: Exception) -> FormatError:
    return FormatError(f"fingerprint cannot be read ({error}); the artifact is damaged")


def _validate(fingerprint: Fingerprint) -> Fingerprint:
    texts = [fingerprint.embedding, fingerprint.prefix, fingerprint.rows, fingerprint.untied, *fingerprint.tensors]
    texts.append(fingerprint.base)
    sizes = [fingerprint.vocab_size, fingerprint.base_vocab_size]
    for shape, digest in fingerprint.tensors.values():
        texts.append(digest)
        sizes.extend(shape)
    for text in texts:
        if not isinstance(text, str) or not text.isprintable():
            raise FormatError(f"fingerprint holds {str(text)[:40]!r} where text belongs; the artifact is damaged")
    for size in sizes:
        if type(size) is not int or not 0 <= size < 2**63:
            raise FormatError(f"fingerprint holds {str(size)[:40]!r} where a size belongs; the artifact is damaged")
    return fingerprint


def _digest_readable(where: str, name: str, digest: Callable[[], str]) -> str:
    """Return the digest; an unreadable dtype (float8, say) is a mismatch, since it had no fingerprint."""
    try:
        return digest()
    except FormatError as error:
        raise BaseMismatchError(f"{where}: tensor {name!r}: {error}") from None


def _mismatch_error(where: str, name: str, what: str, found: str, expected: str) -> BaseMismatchError:
    return BaseMismatchError(f"{where}: tensor {name!r}: {what} differ (digest {found}, expected {expected})")


def sample_positions(shape: tuple[int, ...]) -> np.ndarray:
    """Return up to 64 flat positions, int64, evenly spaced over a tensor, the first and last included."""
    size = math.prod(shape)
    count = min(size, SAMPLES)
    return np.arange(count, dtype=np.int64) * (size - 1) // max(count - 1, 1)


def _digest_values(source: TensorSource, name: str, shape: tuple[int, ...]) -> str:
    """Return 16 hex digits of the SHA-256 over the values at `sample_positions`."""
    positions = sample_positions(shape)
    values = source.values(name, positions) if len(positions) else np.empty(0)
    return hashlib.sha256(values.astype("<f4", copy=False).tobytes()).hexdigest()[:16]


def digest_rows(read: Callable[[np.ndarray], np.ndarray], ids: np.ndarray) -> str:
    """Return the SHA-256 over rows, in order, as 64 hex digits.

    Args:
        read: Reads a block of m rows by their ids, as float32 [m, d].
        ids: The ids of all rows, int64 [n].
    """
    digest = hashlib.sha256()
    for begin in range(0, len(ids), BLOCK_ROWS):
        block = read(ids[begin : begin + BLOCK_ROWS])
        digest.update(np.ascontiguousarray(block, dtype="<f4").data)
    return digest.hexdigest()
