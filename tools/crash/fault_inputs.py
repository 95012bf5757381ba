"""Inputs of fault_merge.py: a base and a delta, other revisions of both, and changes made during a run."""

from pathlib import Path

import numpy as np

from fuzz.pairs import (
    CONFIG,
    LABELS,
    LAYER,
    MODULES,
    NAME,
    PREFIX,
    E,
    Files,
    T,
    base,
    dump,
    fingerprint,
    noise,
    of,
    put,
    safetensors,
)

ROWS, WIDTH, LAYERS = 2048, 64, 2
IDS = tuple(range(0, ROWS, 31))
FREE = slice(7, 20)
"""Positions of a tensor that no fingerprint samples; of the embedding, rows without a token of the delta."""


def tensors() -> dict[str, T]:
    """Return the tensors of the base, 1.6 MB in all."""
    found = {f"bert.{E}": of(noise(ROWS, WIDTH)), f"bert.{LAYER}.weight": of(noise(WIDTH, WIDTH)),
             f"bert.{LAYER}.bias": of(noise(WIDTH))}  # fmt: skip
    for i in range(LAYERS):
        found[f"bert.encoder.layer.{i}.output.dense.weight"] = of(noise(ROWS, WIDTH, seed=50 + i))
    return found


def revise(found: dict[str, T]) -> dict[str, T]:
    """Return another revision of the base that a fingerprint cannot tell from the first."""
    made = {}
    for name, tensor in found.items():
        values = np.frombuffer(tensor.data, "<f4").copy()
        if values.size > 64 * FREE.stop:
            values[slice(64, 8 * 64) if name.endswith(E) else FREE] += 1
        made[name] = T(tensor.dtype, tensor.shape, values.tobytes())
    return made


def base_files(found: dict[str, T], revision: str, *, is_pickled: bool) -> Files:
    """Return a base in three shards, or one pickle, with a tokenizer, a card and a module of Sentence Transformers."""
    files = base(found, shards=1 if is_pickled else 3, pickled=is_pickled)
    files |= {name: node for name, node in MODULES.items() if name.startswith("base/")}
    files["base/config.json"] = dump(CONFIG | {"vocab_size": ROWS, "hidden_size": WIDTH, "revision": revision})
    files["base/tokenizer.json"] = dump({"revision": revision})
    files["base/README.md"] = f"---\nlicense: mit\n---\n# Base, {revision}\n".encode()
    return files


def delta_files(found: dict[str, T], seed: int) -> Files:
    """Return a delta: PEMA, a method that cannot be folded, and a static head."""
    pema = {"architecture": "pema", "unseen": "base"}
    left = {"architecture": None, "phm_dim": 2, "mh_adapter": True, "output_adapter": True}
    config = {"config": {"architecture": "union", "configs": [pema, left]}, "name": NAME,
              "model_class": "BertForSequenceClassification", "model_type": "bert"}  # fmt: skip
    own = {"fingerprint": fingerprint(found, IDS, ROWS), "token_ids": of(IDS, "I32"),
           "weight": of(noise(len(IDS), WIDTH, seed=seed))}  # fmt: skip
    named = {f"{PREFIX}.pema.adapters.{NAME}.{part}": tensor for part, tensor in own.items()}
    down = f"{PREFIX}.encoder.layer.0.output.adapters.{NAME}.adapter_down.0.W_left"
    named[down] = of(noise(2, WIDTH // 2, 1, seed=seed))
    head = {"classifier.weight": of(noise(3, WIDTH, seed=seed)), "classifier.bias": of(noise(3, seed=seed))}
    return {
        "delta/adapter_config.json": dump(config), "delta/adapter.safetensors": safetensors(named),
        "delta/head_config.json": dump({"config": None, "name": None, "model_class": config["model_class"]} | LABELS),
        "delta/model_head.safetensors": safetensors(head),
        "delta/adapter_interface.json": b'{"adapter_types": []}',
    }  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Write base, delta and base-bin to `folder`, and below `folder/revised` another state of each."""
    first = tensors()
    second = revise(first)
    assert fingerprint(second, IDS, ROWS) == fingerprint(first, IDS, ROWS)
    for where, found, seed in ((folder, first, 20), (folder / "revised", second, 30)):
        put(where, base_files(found, where.name, is_pickled=False))
        (where / "base").rename(where / "base-shards")
        put(where, base_files(found, where.name, is_pickled=True))
        (where / "base").rename(where / "base-bin")
        put(where, delta_files(first, seed))


_EACH = "cd {revised}; for f in $(find . -type f); do "
CHANGES = {
    "rewrite-{name}": _EACH + 'cat "$f" > {given}/"$f"; done',
    "overlay-{name}": _EACH + 'dd status=none conv=notrunc if="$f" of={given}/"$f"; done',
    "disguise-{name}": _EACH + 'cp -p {given}/"$f" {kept}/.old; dd status=none conv=notrunc if="$f" of={given}/"$f"; '
    'touch -r {kept}/.old {given}/"$f"; done',
    "replace-{name}": _EACH + 'cp "$f" {kept}/.new && mv {kept}/.new {given}/"$f"; done',
    "cut-{name}": "for f in $(find {given} -type f -not -path '*.pema-undo*'); do truncate -s 3000 $f; done",
    "remove-{name}": "rm -r {given}",
}
"""Shell commands: what somebody does to an input meanwhile. rewrite: each file is cut and written again, as `cp` and
`save_adapter` do; overlay: written over without a cut; disguise: the same,
and the times are set back; replace: another file takes its name."""
APPEAR = "mkdir -p {root}/work/out && echo mine > {root}/work/out/mine.txt"
"""Somebody else makes the output folder."""


def changes(kept: Path, root: Path, base_name: str) -> dict[str, str]:
    """Return `{name: shell command}`."""
    found = {}
    for name, source in (("base", base_name), ("delta", "delta")):
        paths = {"kept": kept, "root": root, "given": root / name, "revised": kept / "revised" / source}
        found |= {key.format(name=name): command.format(**paths) for key, command in CHANGES.items()}
    return found
