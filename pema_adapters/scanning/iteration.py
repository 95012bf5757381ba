"""Tell kinds of data apart without importing their libraries, and iterate over them without side effects."""

import contextlib
import operator
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pema_adapters.errors import VocabularyError


def is_instance_of(data: Any, library: str, name: str) -> bool:
    """Tell whether data are an instance of `library.name`, without importing the library.

    A library that is not loaded cannot have made them.
    """
    kind = getattr(sys.modules.get(library), name, None)
    return isinstance(kind, type) and isinstance(data, kind)


def is_iterable(data: Any) -> bool:
    """Tell whether `iterate` takes data: iterables, and torch's map-style data sets (a length and an index)."""
    return hasattr(data, "__iter__") or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


def iterate(data: Any, name: str) -> Iterator[Any]:
    """Iterate over the items of data.

    Args:
        data: an iterable, or a map-style data set of torch.
        name: the name of the data in errors.

    Raises:
        VocabularyError: the data cannot be an iterable of dicts; text and arrays, for example.
    """
    if isinstance(data, (str, bytes)) or hasattr(data, "__array__") or not is_iterable(data):
        raise VocabularyError(
            f"{name}: found a {type(data).__name__} ({str(data)[:40]!r}), expected a data set, a dict of "
            "splits, or an iterable of dicts such as {'input_ids': [...]}; read a file with datasets.load_dataset, "
            "a DataFrame with datasets.Dataset.from_pandas"
        )
    if hasattr(data, "__iter__"):
        return iter(data)
    return (data[number] for number in range(len(data)))  # they may not raise IndexError at the end


def estimate_length(data: Any) -> int | None:
    """Return the total of a progress bar: rows of data sets, items of other iterables; None if unknown."""
    if is_instance_of(data, "datasets", "Dataset"):
        return len(data)
    if isinstance(data, Mapping):
        parts = [estimate_length(part) for part in data.values()]
        return None if None in parts else sum(part for part in parts if part)
    try:
        return operator.length_hint(data) or None
    except TypeError:
        return None


@contextlib.contextmanager
def preserve_random_state(data: Any) -> Iterator[None]:
    """Restore torch's random state: iterating over a DataLoader draws a seed, which would change the training."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        yield
        return
    own: Any = getattr(data, "generator", None)
    own_state = own.get_state() if isinstance(own, torch.Generator) else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if own_state is not None:
            own.set_state(own_state)
