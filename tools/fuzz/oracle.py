"""Checks after a merge of mutated inputs: refused in one line without a trace, or done and provably right.

The oracle reads inputs and output with the safetensors library and torch, never with the package under test.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fuzz.expected import (
    WIDTHS,
    Escape,
    Inputs,
    cast,
    expected_output,
    float64,
    folded_weight,
    read,
    read_checkpoint,
    read_inputs,
)
from fuzz.pairs import Files, Folder, Link, Pipe, T

LONGEST_MESSAGE = 2000


def check_inputs(root: Path, files: Files, extra: set[str]) -> None:
    """Check that inputs are unchanged, and that beside base and delta there is `extra` at most, and no canary."""
    found = {path.name for path in root.iterdir()}
    if found != {"base", "delta"} | extra:
        raise Escape(f"left behind: {sorted(found - {'base', 'delta'} - extra)}, missing: {sorted(extra - found)}")
    below = {path.relative_to(root).as_posix() for part in ("base", "delta") for path in (root / part).rglob("*")}
    parents = {parent.as_posix() for name in files for parent in Path(name).parents if parent.as_posix().count("/")}
    if below != set(files) | parents:
        raise Escape(f"inputs have other files: {sorted(below ^ (set(files) | parents))}")
    for name, node in files.items():
        if not _is(root, root / name, node):
            raise Escape(f"input {name} was changed")


def _is(root: Path, path: Path, node: Any) -> bool:
    if isinstance(node, bytes):
        return path.read_bytes() == node
    if isinstance(node, Link):
        return path.is_symlink() and str(path.readlink()) == node.target.format(case=root)
    return path.is_dir() if isinstance(node, Folder) else path.is_fifo() and isinstance(node, Pipe)


def check_message(root: Path, path: str, message: str) -> None:
    """Check that a message is one readable line that names the mutated side, or the other one and the mismatch.

    With `path` "", whatever is at fault, one of the two.
    """
    if any(not character.isprintable() for character in message):
        raise Escape(f"unprintable characters in the message {message!r}")
    if len(message) > LONGEST_MESSAGE:
        raise Escape(f"a message of {len(message)} characters: {message[:300]!r}")
    side = path.split("/", maxsplit=1)[0]
    places = {name: str(root / name) for name in ("base", "delta")}
    rest = message.replace(places["base"], "").replace(places["delta"], "")
    named = places[side] in message if side else rest != message
    if not named and (side not in rest or rest == message):
        raise Escape(f"the message does not name the mutated side ({path}): {message}")


def check_output(root: Path, dtype: str | None, report: dict[str, Any]) -> str:
    """Raise `Escape` unless `root/out` is right, all of its floats of `dtype`. Returns a remark, mostly none."""
    out = root / "out"
    inputs = read_inputs(root)
    expected = _as(expected_output(replace(inputs, base=_as(inputs.base, dtype))), dtype)
    found = read_checkpoint(out)
    if inputs.flexible_head and not expected.keys() & found.keys():  # the head is an ordinary one now
        expected = {f"bert.{name}": tensor for name, tensor in expected.items()}
    shards = {name: tensor for path in out.glob("*.safetensors") for name, tensor in read(path).items()}
    if found != shards:
        raise Escape("the output's index does not name all of its shards and tensors")
    folded = {name for name in found if report["tensors_folded"] and _is_folded(inputs, name)}
    for name in found.keys() | expected.keys():
        _check_tensor(name, found.get(name), expected, inputs, name in folded)
    _check_json(out)
    return _remark([tensor for name, tensor in inputs.delta.items() if _is_rows(inputs, name)], report)


def _as(tensors: dict[str, T], dtype: str | None) -> dict[str, T]:
    """Cast floats to another dtype."""
    return {n: cast(t, dtype) if dtype is not None and t.dtype in WIDTHS else t for n, t in tensors.items()}


def _is_folded(inputs: Inputs, name: str) -> bool:
    if f"bert.{name}" in inputs.base:  # of two, the prefixed one counts
        return False
    bare = name.removeprefix("bert.").removesuffix(".weight")
    return any(other.removeprefix("bert.").startswith(f"{bare}.loras.") for other in inputs.delta)


def _is_rows(inputs: Inputs, name: str) -> bool:
    return name.endswith(".weight") and name.removesuffix("weight") + "token_ids" in inputs.delta


def _remark(rows: list[T], report: dict[str, Any]) -> str:
    is_said = any("NaN" in note or "finite" in note for note in report["notes"])
    is_strange = any(part.dtype in WIDTHS and not float64(part).isfinite().all() for part in rows)
    return "NaN or infinite rows merged without a note" if is_strange and not is_said else ""


def _check_tensor(name: str, found: T | None, expected: dict[str, T], inputs: Inputs, is_folded: bool) -> None:
    wanted = expected.get(name)
    if found is None and wanted is not None:
        if inputs.pickled_base and any(other == wanted for key, other in expected.items() if key != name):
            return  # stored once, under the name that the others are tied to
        raise Escape(f"tensor {name!r} is missing in the output")
    if found is not None and any(_same(found, tensor) for tensor in inputs.flexible_head.values()):
        return  # an ordinary head now, perhaps in the place of another
    if wanted is None or found is None:
        raise Escape(f"tensor {name!r} of the output comes from nowhere")
    if is_folded and (found.dtype, found.shape) == (wanted.dtype, wanted.shape):
        _check_folded(name, found, inputs)
    elif found != wanted and not _same_numbers(found, wanted):
        shown = f"{found.dtype}{list(found.shape)} is not the expected {wanted.dtype}{list(wanted.shape)}"
        raise Escape(f"tensor {name!r}: {shown}")


def _check_folded(name: str, found: T, inputs: Inputs) -> None:
    import torch

    wanted = folded_weight(inputs, name)
    precision = {"BF16": 1e-2, "F16": 2e-3}.get(found.dtype, 1e-5)
    made = float64(found).reshape(found.shape)
    if wanted is not None and not torch.allclose(made, wanted, precision, precision, equal_nan=True):
        raise Escape(f"tensor {name!r}: not the base's weight with the adapter's folded in")


def _same(one: T, other: T) -> bool:
    return one == other or (
        other.dtype in WIDTHS and one.dtype in WIDTHS and _same_numbers(one, cast(other, one.dtype))
    )


def _same_numbers(one: T, other: T) -> bool:
    """Whether two tensors are equal up to the bits of NaN, which a cast need not keep."""
    import torch

    if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype not in WIDTHS:
        return False
    return torch.equal(float64(one).nan_to_num(1234.5), float64(other).nan_to_num(1234.5))


def _check_json(out: Path) -> None:
    for path in (out / "config.json", out / "model.safetensors.index.json"):
        try:
            if path.exists():
                json.loads(path.read_bytes())
        except ValueError as error:
            raise Escape(f"{path.name} of the output is not JSON: {error}") from None
