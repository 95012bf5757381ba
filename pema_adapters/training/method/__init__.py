"""PEMA as a method of adapters: its config, its layer, and what `merge_adapter` does with its rows.

`PEMAConfig` is what a user passes to `add_adapter`; `PEMALayer` is the child of the base model that holds each
adapter's `PartialRows` and gives the embedding those of the active one; `merged_rows.py` merges them into the matrix.
New options go into `PEMAConfig`, with a default that leaves saved configs valid; where adapters is patched for them is
`training/patches.py`. Everything here needs adapters, whose configs are imported first: their import registers
`PEMAConfig`, which must not happen while the module of `PEMAConfig` is half imported.
"""

import adapters.configuration.adapter_config as _  # noqa: F401
