"""Base + delta -> plan: what is checked, what is folded, what stays an adapter. Nothing is written here."""

from dataclasses import dataclass, replace

import numpy as np

from pema_adapters.errors import BaseMismatchError, FormatError, MergeError
from pema_adapters.formats.checkpoint import CONFIG, Checkpoint
from pema_adapters.formats.delta import Delta, Head
from pema_adapters.formats.safetensors_header import FLOATS, as_float32
from pema_adapters.merging.folding.adapter_layers import find_adapted_layers
from pema_adapters.merging.heads.convert import StandardHead, convert_head
from pema_adapters.merging.heads.output_matrix import head_with_output, is_of_language_model, place_output
from pema_adapters.merging.heads.registry import TIE
from pema_adapters.merging.plan.plan import Plan
from pema_adapters.merging.planning.auxiliary_files import adapter_files, copy_through_files
from pema_adapters.merging.planning.config_files import config_file, index_file
from pema_adapters.merging.planning.name_matching import match_names
from pema_adapters.merging.planning.weight_files import plan_weight_files

DTYPES = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What `--dtype` may be, and how safetensors files call it."""
_WAY_OUT = "give the base that the delta was trained on, or merge all the same with --allow-base-mismatch"
_IDENTITY = ("model_type", "hidden_size")
_ROWS = 1024


@dataclass(frozen=True)
class PlanOptions:
    """What the caller decides about the plan; see `merge_checkpoint`."""

    dtype: str = "auto"
    fold: bool = True
    allow_base_mismatch: bool = False
    in_place: bool = False


def plan_merge(base: Checkpoint, delta: Delta, options: PlanOptions = PlanOptions()) -> Plan:
    """Check that the delta belongs to the base, and plan every file of the output."""
    code, notes = _dtype_code(options), _check_config(base) + _check_base(base, delta, options.allow_base_mismatch)
    layers, rest = find_adapted_layers(delta, options.fold)
    delta, about_head = _convert_head(base, replace(delta, remaining=rest))
    delta, about_output = place_output(base, delta)
    if delta.weight is None and not layers:
        raise MergeError(
            f"{delta.folder}: adapter {delta.name!r} has no PEMA rows and nothing that folds into weights; nothing to "
            "merge: load it with load_adapter on the base"
        )
    names = match_names(base, delta, [layer.module for layer in layers])
    weights = plan_weight_files(base, delta, names, layers, dtype=code, in_place=options.in_place)
    left = adapter_files(replace(delta, head=head_with_output(base, delta, names.embedding)))
    settings = [file for file in (config_file(base, delta, weights), index_file(base, weights)) if file]
    return Plan(
        files=(*copy_through_files(base.folder, in_place=options.in_place), *weights.files, *left, *settings),
        rounding=weights.rounding,
        rows_merged=len(delta.token_ids),
        vocab_size=weights.vocab_size,
        tensors_changed=weights.changed + weights.added,
        tensors_copied=len(base.tensors) - weights.changed,
        tensors_folded=weights.folded,
        adapters_left=(delta.name,) if left else (),
        notes=(*notes, *weights.notes, *about_head, *about_output, *_note_values(delta), *_note_left_adapter(delta)),
    )


def _dtype_code(options: PlanOptions) -> str | None:
    if options.dtype not in DTYPES:
        raise MergeError(f"dtype {options.dtype!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[options.dtype]


def _check_config(base: Checkpoint) -> list[str]:
    """Return a note where the base has no config.json. Raises `FormatError` where that is a link to nothing."""
    path = base.folder / CONFIG
    if base.config:
        return []
    if path.is_symlink() and not path.is_file():
        raise FormatError(f"{path}: a link that leads to no file; put config.json in its place, or remove the link")
    return ["the base has no config.json, or an empty one, so the output has none: Transformers needs one to load it"]


def _check_base(base: Checkpoint, delta: Delta, allow: bool) -> list[str]:
    """Compare the base with the delta's fingerprint. Returns what there is to note if a mismatch is allowed."""
    try:
        _check_architecture(base, delta)
        _check_fingerprint(base, delta)
    except BaseMismatchError as error:
        if not allow:
            raise BaseMismatchError(f"{error}; {_WAY_OUT}") from None
        return [f"merged all the same: {error}"]
    if delta.fingerprint is not None:
        return []
    return ["without PEMA rows there is no fingerprint: only names and shapes tell that the adapter fits this base"]


def _check_fingerprint(base: Checkpoint, delta: Delta) -> None:
    if delta.fingerprint is not None:
        delta.fingerprint.check(base, delta.token_ids, where=str(base.folder))
    elif delta.weight is not None:
        raise BaseMismatchError(
            f"{delta.weight.path}: no fingerprint of the base it was trained on, so it may belong to another"
        )


def _check_architecture(base: Checkpoint, delta: Delta) -> None:
    for key in _IDENTITY:
        found, expected = base.config.get(key), delta.config.get(key)
        if found is not None and expected is not None and found != expected:
            raise BaseMismatchError(
                f"{base.folder / 'config.json'}: {key} is {str(found)[:40]!r}, but the delta was trained on "
                f"{str(expected)[:40]!r}"
            )


def _convert_head(base: Checkpoint, delta: Delta) -> tuple[Delta, list[str]]:
    """Return the delta with its flexible head as that of an ordinary class if one is equal; else the reason."""
    if delta.head is None or delta.head.is_static:
        return delta, []
    config = base.config
    if delta.fingerprint is not None:
        config = {**config, "vocab_size": delta.fingerprint.vocab_size}
    if delta.untied:
        config = {**config, TIE: False}
    found = convert_head(delta.head, config, keeps_base_output=bool(delta.untied))
    reason = found if isinstance(found, str) else _mismatch_reason(base, delta, delta.head, found)
    if isinstance(found, str) or reason:
        return delta, [f"its flexible head stays in adapters/{delta.name}, for AutoAdapterModel's load_head: {reason}"]
    head_config = {"config": None, "model_class": found.model_class}
    head = Head(head_config, found.tensors, found.config, found.prefix, delta.head.path, found.output)
    return replace(delta, head=head), [f"its flexible head is now that of {found.model_class}"]


def _mismatch_reason(base: Checkpoint, delta: Delta, head: Head, found: StandardHead) -> str:
    """Explain why base and rest of the adapter keep the class from computing the same; "" if they do not."""
    names = tuple(base.tensors)
    if missing := [need for need in found.needs if not any(_ends(name, need) for name in names)]:
        return f"{found.model_class} needs {missing[0]}, which the base lacks (the model drew it at random)"
    if added := [name for name in names for zero in found.zero if _ends(name, zero) and any(base.read(name))]:
        return f"{found.model_class} adds {added[0]} of the base, which the flexible head does not"
    if found.prefix not in ("", delta.prefix):
        return f"{found.model_class} calls its backbone {found.prefix!r}, the base {delta.prefix!r}"
    return _mismatch_reason_of_language_model(names, delta) if is_of_language_model(head) else ""


def _mismatch_reason_of_language_model(names: tuple[str, ...], delta: Delta) -> str:
    if delta.remaining.config is not None and any(method.is_invertible for method in delta.remaining.config.methods):
        return "the adapter is invertible, and undone before the head"
    if any(name.endswith("decoder.bias") for name in names):
        return "the base stores the bias of its output twice"
    return ""


def _ends(name: str, part: str) -> bool:
    return name == part or name.endswith("." + part)


def _note_values(delta: Delta) -> list[str]:
    """Note NaN and infinity in the rows, which are merged as they are."""
    weight = delta.weight
    if weight is None or weight.dtype not in FLOATS or not len(delta.token_ids):
        return []
    size, bad = weight.nbytes // len(delta.token_ids), []
    for begin in range(0, len(delta.token_ids), _ROWS):
        ids = delta.token_ids[begin : begin + _ROWS]
        rows = np.frombuffer(weight.read(begin * size, (begin + len(ids)) * size), np.uint8).reshape(len(ids), -1)
        bad += ids[~np.isfinite(as_float32(rows, weight.dtype)).all(axis=1)].tolist()
    return [f"warning: {len(bad)} of its rows hold NaN or infinity, the first is token {bad[0]}"] if bad else []


def _note_left_adapter(delta: Delta) -> list[str]:
    if delta.remaining.config is None:
        return []
    methods = ", ".join(method.name for method in delta.remaining.config.methods)
    return [f"the other weights of adapter {delta.name!r} stay an adapter, in adapters/{delta.name}: {methods}"]
