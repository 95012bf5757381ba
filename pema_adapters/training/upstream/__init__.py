"""The only code that uses private names of adapters, Transformers and accelerate; all other modules import it.

`PATCH_TARGETS` lists the functions that PEMA wraps (`patch`, `unpatch`), `on_import` defers the wrapping until their
module is imported, and `context.py` holds the context variables that wrappers share. `adapters_internals.py` and
`transformers_internals.py` give each private name a function; `bug_fixes.py` and `merged_layers.py` fix bugs in
adapters 1.3. Importing this package imports neither torch nor adapters nor Transformers, so a module here imports them
inside its functions. When a new version of theirs breaks something, change this package alone: the contract, every
name, signature and behaviour in use, is tests/training/upstream/test_contract.py.
"""

from pema_adapters.training.upstream.adapters_internals import (
    ADAPTER_PREFIXES,
    METHOD,
    add_child,
    find_adapter_tensors,
    find_lora_layers,
    find_parallel_blocks,
    find_prefix_pools,
    flatten_setup,
    has_adapters_support,
    has_flexible_heads,
    has_only_safetensors,
    pema_layer,
    register_config_name,
    remove_child,
    replace_adapter_config,
    use_safetensors_format,
)
from pema_adapters.training.upstream.bug_fixes import BUG_FIXES
from pema_adapters.training.upstream.context import (
    deferred_matrices,
    override,
    pushing_rows,
    saving_all_adapters,
    writing_trainer_checkpoint,
)
from pema_adapters.training.upstream.import_hooks import cancel, on_import
from pema_adapters.training.upstream.merged_layers import merge_layers, reset_layers
from pema_adapters.training.upstream.patching import PATCH_TARGETS, PATCHED_MODULES, patch, unpatch
from pema_adapters.training.upstream.transformers_internals import (
    find_decayed_parameters,
    find_hub_kernel,
    find_renamed_tensors,
    get_commit_hash,
    ignore_unexpected_tensors,
    mark_as_initialized,
    pin_weight,
    resolve_load_dtype,
)

__all__ = [
    "ADAPTER_PREFIXES", "BUG_FIXES", "METHOD", "PATCHED_MODULES", "PATCH_TARGETS", "add_child", "cancel",
    "deferred_matrices", "find_adapter_tensors", "find_decayed_parameters", "find_hub_kernel", "find_lora_layers",
    "find_parallel_blocks", "find_prefix_pools", "find_renamed_tensors", "flatten_setup", "get_commit_hash",
    "has_adapters_support", "has_flexible_heads", "has_only_safetensors", "ignore_unexpected_tensors",
    "mark_as_initialized", "merge_layers", "on_import", "override", "patch", "pema_layer", "pin_weight",
    "pushing_rows", "register_config_name", "remove_child", "replace_adapter_config", "reset_layers",
    "resolve_load_dtype", "saving_all_adapters", "unpatch", "use_safetensors_format", "writing_trainer_checkpoint",
]  # fmt: skip
