"""The partial vocabulary: the rows of an embedding matrix that the data use (V' in the paper, section 4).

    vocabulary = PartialVocabulary.from_dataset(tokenized, vocab_size=250_002)
    vocabulary                              # PartialVocabulary(5,534 of 250,002 rows, 97.8% less)
    vocabulary.save("rte.vocabulary")

Requires only numpy and safetensors. `scanning` reads the data sets.
"""

import operator
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pema_adapters.errors import FormatError, VocabularyError
from pema_adapters.formats.versions import UNVERSIONED, check_version
from pema_adapters.io.atomic_write import replace_file
from pema_adapters.scanning.validation import DEFAULT_COLUMNS, validate_vocab_size

FORMAT = "pema-vocabulary"
VERSION = 1

TokenIds = npt.NDArray[np.int32]


class PartialVocabulary:
    """The K token ids that the data use, out of the V rows of a full embedding matrix. Immutable, hashable, picklable.

    Args:
        token_ids: integers in [0, V) in any order, with or without duplicates: a sequence, set, range, array or tensor.
        vocab_size: V, the number of rows of the full embedding matrix, in [1, 2**31].

    Raises:
        VocabularyError: an id is not an integer or outside [0, V), or V is out of range.
    """

    __slots__ = ("_token_ids", "_vocab_size")

    def __init__(self, token_ids: Iterable[int] | npt.ArrayLike, vocab_size: int) -> None:
        self._vocab_size = validate_vocab_size(vocab_size)
        self._token_ids = _sort_ids(token_ids, self._vocab_size)

    @classmethod
    def from_dataset(  # noqa: PLR0913 - the settings of one call, by name
        cls,
        data: Any,
        *,
        vocab_size: int,
        columns: Collection[str] = DEFAULT_COLUMNS,
        optional: Collection[str] = (),
        progress: bool | None = None,
        num_proc: int = 1,
    ) -> "PartialVocabulary":
        """Collect all token ids of tokenized data.

        Args:
            data: a `datasets.Dataset` or `IterableDataset`, a dict of splits, a list of these, a DataLoader, or any
                iterable of rows or batches (dicts of lists, arrays or tensors, ragged or not). A generator is
                exhausted; other data are not changed.
            vocab_size: V, the number of rows of the embedding, `model.get_input_embeddings().num_embeddings`.
            columns: the columns of ids. The two default columns are read where they exist; every other one must exist
                in some split. Negative ids in columns that end in "labels" are skipped.
            optional: those of `columns` that need not exist.
            progress: True or False to show or hide the progress bar; None shows it on a terminal if the scan is slow.
            num_proc: the number of threads that read a `datasets.Dataset`; NumPy releases the GIL. Other data have no
                random access: one thread reads them, with a warning.

        Raises:
            VocabularyError: a column does not exist or does not hold integers, or an id is outside [0, V). The message
                names the split, the column, the row and the id.
        """
        from pema_adapters.scanning.scanner import scan

        options: dict[str, Any] = {"columns": columns, "optional": optional, "progress": progress}
        return cls(scan(data, vocab_size=vocab_size, num_proc=num_proc, **options).token_ids, vocab_size)

    @property
    def token_ids(self) -> TokenIds:
        """The ids, int32 [K], strictly increasing, read-only."""
        return self._token_ids

    @property
    def vocab_size(self) -> int:
        """V, the rows of the full embedding matrix."""
        return self._vocab_size

    @property
    def reduction(self) -> float:
        """1 - K/V, the share of the rows that need not be in memory."""
        return 1 - len(self) / self.vocab_size

    def __len__(self) -> int:
        return len(self._token_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._token_ids.tolist())

    def __contains__(self, token_id: object) -> bool:
        try:
            wanted = operator.index(token_id)  # type: ignore[arg-type]
        except TypeError:
            return False
        at = int(np.searchsorted(self._token_ids, wanted))
        return at < len(self) and int(self._token_ids[at]) == wanted

    def __or__(self, other: object) -> "PartialVocabulary":
        """Return the union with a vocabulary of the same V."""
        if not isinstance(other, PartialVocabulary):
            return NotImplemented
        if self.vocab_size != other.vocab_size:
            raise VocabularyError(
                f"cannot combine vocabularies of different sizes: V = {self.vocab_size:,} on the left, "
                f"{other.vocab_size:,} on the right; scan both data sets for the same model"
            )
        return PartialVocabulary(np.concatenate([self._token_ids, other._token_ids]), self.vocab_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PartialVocabulary):
            return NotImplemented
        return self.vocab_size == other.vocab_size and np.array_equal(self._token_ids, other._token_ids)

    def __hash__(self) -> int:
        return hash((self.vocab_size, self._token_ids.tobytes()))

    def __reduce__(self) -> tuple[Any, ...]:
        return PartialVocabulary, (self._token_ids, self.vocab_size)  # unpickled arrays would be writable

    def __repr__(self) -> str:
        return f"PartialVocabulary({len(self):,} of {self.vocab_size:,} rows, {self.reduction:.1%} less)"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a small safetensors file, atomically; an existing file is replaced.

        Args:
            path: the file.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        from safetensors.numpy import save

        metadata = {"format": FORMAT, "version": str(VERSION), "vocab_size": str(self.vocab_size)}
        replace_file(Path(path), save({"token_ids": self._token_ids}, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PartialVocabulary":
        """Read a file that `save` wrote.

        Args:
            path: the file.

        Raises:
            FormatError: the file is missing, damaged, or not a vocabulary file.
        """
        token_ids, vocab_size = _read_file(Path(path))
        try:
            return cls(token_ids, vocab_size)
        except VocabularyError as error:
            raise FormatError(f"{path}: a damaged vocabulary file: {error}") from error


def _sort_ids(token_ids: Any, vocab_size: int) -> TokenIds:
    if not hasattr(token_ids, "__array__"):
        token_ids = list(token_ids)
    elif hasattr(token_ids, "detach"):  # a torch tensor on any device
        token_ids = token_ids.detach().cpu()
    ids = np.asarray(token_ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise VocabularyError(f"found token ids of type {ids.dtype}, expected integers (first: {ids.flat[0]!r})")
    ids = _sort_unique(ids.reshape(-1))
    _check_range(ids, vocab_size)
    ids = ids.astype(np.int32)
    ids.setflags(write=False)
    return ids


def _check_range(sorted_ids: npt.NDArray[Any], vocab_size: int) -> None:
    if sorted_ids.size and not (sorted_ids[0] >= 0 and sorted_ids[-1] < vocab_size):
        found = sorted_ids[0] if sorted_ids[0] < 0 else sorted_ids[-1]
        raise VocabularyError(
            f"token id {found} is outside the embedding, whose V = {vocab_size:,} rows are 0 to {vocab_size - 1:,}"
        )


def _sort_unique(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sort ids and remove duplicates, faster than np.unique: increasing ids are returned as they are."""
    if np.all(ids[1:] > ids[:-1]):
        return ids
    ids = np.sort(ids)
    return np.asarray(ids[np.concatenate([[True], ids[1:] != ids[:-1]])])


def _read_file(path: Path) -> tuple[TokenIds, int]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FormatError(f"{path}: no such file; expected a file written by PartialVocabulary.save")
    try:
        with safe_open(path, framework="numpy") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            _check_version(path, metadata)
            ids = file.get_tensor("token_ids") if "token_ids" in names else None
    except SafetensorError as error:
        raise FormatError(f"{path}: damaged, or not a safetensors file ({error}); save the vocabulary again") from error
    if ids is None or metadata.get("format") != FORMAT:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise FormatError(
            f"{path}: not a vocabulary file: found the tensors {shown or '(none)'} and the format "
            f"{metadata.get('format')!r}, expected the tensor token_ids and {FORMAT!r}"
        )
    return _validate_content(path, ids, metadata.get("vocab_size", ""))


def _check_version(path: Path, metadata: dict[str, str]) -> None:
    found = metadata.get("version", str(UNVERSIONED))
    is_number = found.isascii() and found.isdecimal() and len(found) < 10
    if metadata.get("format") == FORMAT:
        check_version(int(found) if is_number else found, VERSION, where=f"{path}: ")


def _validate_content(path: Path, ids: npt.NDArray[Any], vocab_size: str) -> tuple[TokenIds, int]:
    if ids.dtype != np.int32 or ids.ndim != 1:
        raise FormatError(f"{path}: token_ids is {ids.dtype} {list(ids.shape)}, expected int32 [K]")
    if not np.all(ids[1:] > ids[:-1]):
        raise FormatError(f"{path}: token_ids do not increase; the file is damaged, save the vocabulary again")
    if not (vocab_size.isascii() and vocab_size.isdigit()):
        raise FormatError(f"{path}: vocab_size is {vocab_size!r} in the file's metadata, expected V in digits")
    return ids, int(vocab_size)
