"""The partial embedding E' [K, d] as a torch module: an `nn.Embedding` [V, d] with only some rows in memory.

`PartialEmbedding` is converted from an `nn.Embedding` in place (`conversion.py`) and looks tokens up; `RowTable` holds
K rows and their token ids, `PartialRows` those of an adapter. `RowIndex`, `dynamic_rows.py` and `optimizer_state.py`
keep gradients and optimizer state with their tokens when rows are added; `unseen_monitor.py` reports tokens without a
row. README.md explains the states and the lookup. Nothing here depends on adapters or Transformers, and it should stay
that way. The names `token_ids`, `weight` and `fingerprint` are file format; all else may be changed.
"""
