"""Whose tensor is whose: names of the delta, of the base, of the output."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from pema_adapters.errors import BaseMismatchError, MergeError
from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.delta import Delta
from pema_adapters.formats.stored_tensor import StoredTensor
from pema_adapters.formats.tensor_names import EMBEDDINGS, canonicalize, map_canonical_names


@dataclass(frozen=True)
class NameMap:
    """How a base and a delta name their tensors.

    prefix: of the base model. embedding: E as stored in the base, "" where the delta has no rows.
    stored: canonical name -> name in the base.
    own_base: the trained model was a base model itself, so all of the delta's tensors are inside it.
    is_prefixed: whether the base's names carry the prefix. add_prefix: whether the output's do, the base's do not.
    """

    prefix: str
    embedding: str
    stored: dict[str, str]
    own_base: bool
    is_prefixed: bool
    add_prefix: bool

    def in_base(self, name: str) -> str | None:
        """Return the base's name of a tensor of the delta, None if it has no such tensor."""
        return self.stored.get(canonicalize(name, self.prefix))

    def in_output(self, stored: str) -> str:
        """Return the output's name of a tensor of the base."""
        return f"{self.prefix}.{stored}" if self.add_prefix else stored

    def is_inside(self, name: str) -> bool:
        """Return whether a tensor of the delta is one of the base model, rather than of a head on top of it."""
        return self.own_base or not self.prefix or name.startswith(self.prefix + ".")

    def new(self, name: str) -> str:
        """Return the output's name of a tensor of the delta that the base lacks."""
        if not self.prefix or not self.is_inside(name):
            return name
        bare = name.removeprefix(self.prefix + ".")
        return f"{self.prefix}.{bare}" if self.is_prefixed or self.add_prefix else bare


def match_names(base: Checkpoint, delta: Delta, modules: Collection[str] = ()) -> NameMap:
    """Match the delta's names to the base's; `modules` are those that are folded.

    Raises `BaseMismatchError` where E, or a module, is not in the base.
    """
    if delta.weight is None:
        names = _without_rows(base, modules)
    else:
        prefix, embedding, stored = _locate_embedding(base, delta, delta.weight)
        is_prefixed = bool(prefix) and embedding.startswith(prefix + ".")
        guessed = delta.kind == "full" and delta.fingerprint is None
        own_base = not delta.embedding.startswith(prefix + ".") if guessed else delta.own_base
        names = NameMap(prefix, embedding, stored, own_base, is_prefixed, add_prefix=False)
    untied = [delta.untied] if delta.untied and not delta.is_output_in_head else []
    new_heads = [n for n in (*delta.checkpoint_tensors, *untied) if not names.is_inside(n) and names.in_base(n) is None]
    in_class = delta.head.prefix if delta.head and delta.head.prefix is not None else names.prefix
    return replace(names, add_prefix=bool(new_heads) and bool(in_class) and not names.is_prefixed)


def _without_rows(base: Checkpoint, modules: Collection[str]) -> NameMap:
    """Match the names of a delta without PEMA rows: its first module tells the prefix."""
    wanted = f"{next(iter(modules))}.weight"
    found = next((name for name in base.tensors if _is_called(name, wanted)), None)
    if found is None:
        raise BaseMismatchError(
            f"{base.folder}: no tensor {wanted!r}, which the adapter changes; give the base that it was trained on"
        )
    prefix = _difference(found, wanted) or _first_part(base, wanted)
    own_base = bool(prefix) and not wanted.startswith(prefix + ".")
    return NameMap(
        prefix,
        "",
        map_canonical_names(base.tensors, prefix),
        own_base,
        found.startswith(prefix + "."),
        add_prefix=False,
    )


def _first_part(base: Checkpoint, name: str) -> str:
    """Return `bert` of `bert.encoder...` if the embedding is inside of it as well; else ""."""
    first = name.partition(".")[0] + "."
    inside = any(stored.startswith(first) and stored.endswith(EMBEDDINGS) for stored in base.tensors)
    return first.removesuffix(".") if inside else ""


def find_copies(base: Checkpoint, names: NameMap, is_untied: bool = False) -> list[str]:
    """Find further stored copies of E: same shape, same bytes, and tied to it by the model's configuration.

    Copies of the input embedding (encoder.embed_tokens, ...) are always tied, output embeddings unless
    `tie_word_embeddings` is false, or the delta unties them.
    """
    matrix = base.tensors[names.embedding]
    tied = base.config.get("tie_word_embeddings", True) is not False and not is_untied
    return [
        tensor.name
        for tensor in base.tensors.values()
        if tensor.name != matrix.name
        and (tensor.shape, tensor.dtype) == (matrix.shape, matrix.dtype)
        and (tied or tensor.name.endswith(EMBEDDINGS))
        and _same_bytes(base, tensor.name, matrix.name)
    ]


def _same_bytes(base: Checkpoint, name: str, other: str, step: int = 8 << 20) -> bool:
    left, right = base.tensor(name), base.tensor(other)
    ranges = ((at, min(at + step, left.nbytes)) for at in range(0, left.nbytes, step))
    return all(left.read(*part) == right.read(*part) for part in ranges)


def _locate_embedding(base: Checkpoint, delta: Delta, weight: StoredTensor) -> tuple[str, str, dict[str, str]]:
    """Return the prefix, E as stored, and `{canonical name: stored name}`."""
    if delta.fingerprint is not None:
        stored = delta.fingerprint.match_names(base.tensors.keys())
        if delta.embedding not in stored:
            raise BaseMismatchError(f"{base.folder}: no tensor {delta.embedding!r}, which the delta's base has")
        embedding = stored[delta.embedding]
        prefix = embedding.removesuffix(delta.embedding).removesuffix(".") or delta.prefix
        return prefix, embedding, stored
    return _guess_embedding(base, delta, weight)


def _guess_embedding(base: Checkpoint, delta: Delta, weight: StoredTensor) -> tuple[str, str, dict[str, str]]:
    """Return the same for a delta without fingerprint, by the name of its rows or the usual names of embeddings."""
    wanted = delta.embedding
    names = [name for name in base.tensors if _is_called(name, wanted)] if wanted else _common_embeddings(base, weight)
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise MergeError(
            f"{base.folder}: expected one tensor that can be {wanted or 'the embedding'!r} of the delta "
            f"{delta.folder}, whose rows are {list(weight.shape)}, found {found}"
        )
    prefix = delta.prefix or _difference(names[0], wanted)
    return prefix, names[0], map_canonical_names(base.tensors, prefix)


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted) or wanted.endswith("." + name)


def _common_embeddings(base: Checkpoint, weight: StoredTensor) -> list[str]:
    return [
        tensor.name
        for tensor in base.tensors.values()
        if tensor.name.endswith(EMBEDDINGS) and len(tensor.shape) == 2 and tensor.shape[1] == weight.shape[1]
    ]


def _difference(one: str, other: str) -> str:
    """Return the longer name's first part: `_difference("bert.x", "x") == _difference("x", "bert.x") == "bert"`."""
    longer, shorter = max(one, other, key=len), min(one, other, key=len)
    return longer.removesuffix(shorter).removesuffix(".") if other else ""
