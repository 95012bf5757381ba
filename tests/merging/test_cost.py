"""A merge imports files-and-bytes libraries only, and its memory does not depend on the size of the matrix."""

import json
import subprocess
import sys
import textwrap

import numpy as np

from pema_adapters.formats.checkpoint import Checkpoint
from pema_adapters.formats.fingerprint import Fingerprint
from pema_adapters.formats.safetensors_header import encode_header
from tests.merging.conftest import D, T, noise, read


def run(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_merge_imports_neither_torch_nor_transformers_nor_adapters(make_base, make_adapter, make_full, tmp_path):
    base = make_base(dtype="BF16", shards=2)
    folders = [make_adapter(base).folder, make_full(base, folder="full").folder]
    run(f"""
        import sys
        from pema_adapters import merge_checkpoint
        for folder in {[str(folder) for folder in folders]}:
            assert merge_checkpoint({str(base.folder)!r}, folder, verify=True).rows_merged == 6
        heavy = ["torch", "transformers", "adapters", "datasets", "huggingface_hub", "safetensors"]
        assert not [name for name in heavy if name in sys.modules], sys.modules.keys()
    """)


def test_folding_does_not_either(make_base, make_adapter, tmp_path):
    base = make_base()
    layer = "bert.encoder.layer.0.output.dense.loras.task"
    parts = {f"{layer}.lora_A": T.of(noise(2, D)), f"{layer}.lora_B": T.of(noise(D, 2))}
    delta = make_adapter(base, rest=parts).folder
    config = json.loads((delta / "adapter_config.json").read_bytes())
    config["config"]["configs"][1] = {"architecture": "lora", "r": 2, "alpha": 4, "composition_mode": "add"}
    (delta / "adapter_config.json").write_text(json.dumps(config))
    run(f"""
        import sys
        from pema_adapters import merge_checkpoint
        assert merge_checkpoint({str(base.folder)!r}, {str(delta)!r}, verify=True).tensors_folded == 1
        assert not [name for name in ("torch", "transformers", "adapters") if name in sys.modules]
    """)
    made = read(delta / "merged")["bert.encoder.layer.0.output.dense.weight"].values
    weight, left, right = (t.values.double() for t in (base.tensors["bert.encoder.layer.0.output.dense.weight"],
                                                       parts[f"{layer}.lora_B"], parts[f"{layer}.lora_A"]))  # fmt: skip
    assert (made - (weight + 2 * left @ right)).abs().max() < 1e-6


def test_help_imports_not_even_numpy():
    assert "--dry-run" in run("""
        import sys
        from pema_adapters.cli.merge import main
        try:
            main(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        assert "numpy" not in sys.modules and "pema_adapters.merging" not in sys.modules
    """)


def sparse_pair(tmp_path, rows=100_000, dim=512, count=50_000):
    """A base of 205 MB of zeros, which take no room on disk, and a delta with half of its rows (102 MB)."""
    base, delta = tmp_path / "base", tmp_path / "run"
    for folder in (base, delta):
        folder.mkdir()
    with (base / "model.safetensors").open("wb") as file:
        head = encode_header([("wte.weight", "F32", (rows, dim))], {})
        file.write(head)
        file.truncate(len(head) + 4 * rows * dim)
    ids = np.arange(count, dtype=np.int32) * (rows // count)
    taken = Fingerprint.compute(Checkpoint.open(base), embedding="wte.weight", prefix="", vocab_size=rows, token_ids=ids,
                             names=[]).to_array()  # fmt: skip
    parts = [("fingerprint", "U8", taken.shape), ("token_ids", "I32", ids.shape), ("weight", "F32", (count, dim))]
    with (delta / "adapter.safetensors").open("wb") as file:
        file.write(encode_header([(f"pema.adapters.task.{name}", *rest) for name, *rest in parts], {}))
        file.write(taken.tobytes() + ids.tobytes() + np.ones((count, dim), np.float32).tobytes())
    (delta / "adapter_config.json").write_text(json.dumps({"name": "task", "config": "pema"}))
    return base, delta


def test_memory_is_bounded(tmp_path):
    """The whole merge, proof included, runs in 40 MB above what the process had (8 are a thread's stack): the system enforces it."""
    base, delta = sparse_pair(tmp_path)
    run(f"""
        import re, resource
        from pathlib import Path
        from pema_adapters.merging.api import merge_checkpoint
        data = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (data + (40 << 20), -1))
        try:
            bytearray(41 << 20)
        except MemoryError:
            pass
        else:
            raise SystemExit("the limit is not enforced here")
        merge_checkpoint({str(base)!r}, {str(delta)!r}, verify=True)
    """)
    (delta / "merged" / "model.safetensors").unlink()
