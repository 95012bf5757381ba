"""The size of an artifact beside what it must hold: K rows, K ids, and the adapter's own bytes.

    python tools/bench_artifact.py [--layers 2] [--json FILE] [--save]

XLM-R-base's shape (V = 250,002, d = 768, K = 20,000) with PEMA + Compacter, in both file formats; beside it what
adapters saves of a model whose full matrix was trained.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import adapters
from adapters import CompacterConfig, ConfigUnion

from harness.command_line import make_parser
from harness.results import write_results
from harness.tables import format_table
from harness.xlmr import choose_token_ids, make_model
from pema_adapters import PartialVocabulary, PEMAConfig, shrink_embeddings

V, K, D = 250_002, 20_000, 768
WEIGHTS = {"safetensors": "adapter.safetensors", "bin": "pytorch_adapter.bin"}


def make_adapter_model(config: Any, layers: int) -> Any:
    model = make_model(V, layers)
    adapters.init(model)
    model.add_adapter("task", config=config)
    return model


def measure_saved_bytes(model: Any, folder: Path, kind: str) -> int:
    model.save_adapter(str(folder), "task", use_safetensors=kind == "safetensors")
    return sum_sizes(folder, [WEIGHTS[kind]])


def sum_sizes(folder: Path, names: Iterable[str]) -> int:
    return sum((folder / name).stat().st_size for name in names)


def measure(layers: int) -> dict[str, Any]:
    compacter, found = CompacterConfig(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = make_adapter_model(compacter, layers)
        alone.save_embeddings(str(folder / "matrix"), "default")
        full = sum_sizes(folder / "matrix", ["embedding.pt"])
        partial = make_adapter_model(ConfigUnion(PEMAConfig(), compacter), layers)
        shrink_embeddings(partial, "task", PartialVocabulary(choose_token_ids(V, K), V))
        for kind in WEIGHTS:
            own = measure_saved_bytes(alone, folder / f"alone-{kind}", kind)
            artifact = measure_saved_bytes(partial, folder / f"pema-{kind}", kind)
            found[kind] = {"artifact": artifact, "needed": K * D * 4 + 4 * K + own, "full_matrix": full + own}
    return {"layers": layers, "bytes": found}


def render(figures: dict[str, Any]) -> str:
    rows = [
        [
            kind, f"{found['artifact'] / 1e6:.3f}", f"{found['needed'] / 1e6:.3f}",
            f"{found['artifact'] / found['needed']:.4f}", f"{found['full_matrix'] / 1e6:.1f}",
            f"{found['artifact'] / found['full_matrix']:.3f}",
        ]
        for kind, found in figures["bytes"].items()
    ]  # fmt: skip
    header = ["format", "artifact MB", "K*d*4 + 4K + adapter MB", "ratio", "full matrix + adapter MB", "ratio"]
    caption = f"PEMA + Compacter, {figures['layers']} layers, V = {V:,}, K = {K:,}, d = {D}, float32"
    return f"{caption}\n\n{format_table(header, rows)}"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    figures = measure(options.layers)
    print(render(figures))
    write_results(options, figures)


if __name__ == "__main__":
    main()
