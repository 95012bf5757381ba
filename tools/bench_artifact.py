"""The size of an artifact beside what it must hold: K rows, K ids, and the adapter's own bytes.

    python tools/bench_artifact.py [--layers 2] [--json FILE]

XLM-R-base's shape (V = 250,002, d = 768, K = 20,000) with PEMA + Compacter, in both file formats; beside it what
adapters saves of a model whose full matrix was trained.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import adapters
from _bench import parser, table, write_json
from adapters import CompacterConfig, ConfigUnion
from bench_step import model_of, token_ids

from pema_adapters import PartialVocabulary, PEMAConfig, shrink_embeddings

V, K, D = 250_002, 20_000, 768
WEIGHTS = {"safetensors": "adapter.safetensors", "bin": "pytorch_adapter.bin"}


def with_adapter(config: Any, layers: int) -> Any:
    model = model_of(V, layers)
    adapters.init(model)
    model.add_adapter("task", config=config)
    return model


def saved_bytes(model: Any, folder: Path, kind: str) -> int:
    model.save_adapter(str(folder), "task", use_safetensors=kind == "safetensors")
    return size(folder, [WEIGHTS[kind]])


def size(folder: Path, names: Iterable[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=2)
    options = options.parse_args()
    compacter = CompacterConfig()
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = with_adapter(compacter, options.layers)
        alone.save_embeddings(str(folder / "matrix"), "default")
        full = size(folder / "matrix", ["embedding.pt"])
        partial = with_adapter(ConfigUnion(PEMAConfig(), compacter), options.layers)
        shrink_embeddings(partial, "task", PartialVocabulary(token_ids(V, K), V))
        for kind in WEIGHTS:
            own = saved_bytes(alone, folder / f"alone-{kind}", kind)
            artifact = saved_bytes(partial, folder / f"pema-{kind}", kind)
            needed = K * D * 4 + 4 * K + own
            figures[kind] = {
                "artifact": artifact,
                "needed": needed,
                "ratio": artifact / needed,
                "full_matrix": full + own,
            }
            rows.append((kind, *(f"{n / 1e6:.3f}" for n in (artifact, needed)), f"{artifact / needed:.4f}",
                         f"{(full + own) / 1e6:.1f}", f"{artifact / (full + own):.3f}"))  # fmt: skip
    print(f"PEMA + Compacter, {options.layers} layers, V = {V:,}, K = {K:,}, d = {D}, float32")
    print(
        table(["format", "artifact MB", "K*d*4 + 4K + adapter MB", "ratio", "full matrix + adapter MB", "ratio"], rows)
    )
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
