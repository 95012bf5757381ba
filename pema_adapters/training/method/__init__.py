"""PEMA as a method of adapters: its config, its layer, and what `merge_adapter` does with its rows.

Everything here needs adapters. It is imported first, because its import registers `PEMAConfig` (see `patches`), which
must not happen while the module of `PEMAConfig` is half imported.
"""

import adapters.configuration.adapter_config as _  # noqa: F401
