"""Merges beside the plain copy of the same file, and beside the ways that load the model into memory.

    python tools/bench_merge.py [--dir FOLDER] [--rounds 5] [--skip NAME] [--mergekit PYTHON] [--json FILE]

A checkpoint of XLM-V-base's shape (V = 901,629, d = 768, 12 layers; 3.1 GB of noise), an adapter of K = 60,000 rows,
and one of the same rows with LoRA (r = 8) on q, k, v and both feed-forward matrices.

Contestants take turns, each a fresh process from the shell, its start included: `cp` + fsync of model.safetensors, a
merge of the rows, one that folds LoRA as well, and one of the rows in place. All end on disk; outputs are removed, a
base merged in place is put back, and the disk is idle, before the next one starts. Peers that hold the model in memory
run once: transformers + adapters, and mergekit if `--mergekit` names the interpreter of an environment that has it.
"""


from _merge_shapes import Shape

SHAPE, K = Shape(901_629, 12), 60_000
NEEDED_BYTES = 14e9
CP = "cp + fsync"
AIMS = {"rows": (1.15, 64), "rows + LoRA": (1.5, 400), "rows, in place": (0.5, 64)}
"""Of each merge: at most so many times `cp`, at most so many MB of anonymous memory."""
