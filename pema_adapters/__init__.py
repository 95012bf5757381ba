"""Fine-tune language models without the cost of the vocabulary: PEMA for the `adapters` library.

Importing this package makes "pema" a method of adapters, whether adapters is imported before or after. It loads neither
adapters nor torch: each public name is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pema_adapters.training import patches

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pema_adapters.analysis.memory_report import MemoryReport, memory_report
    from pema_adapters.errors import PemaError
    from pema_adapters.merging.api import merge_checkpoint, undo_merge
    from pema_adapters.merging.report import MergeReport
    from pema_adapters.publishing.push import push_merged_to_hub
    from pema_adapters.training.load_model import load_model
    from pema_adapters.training.method.config import PEMAConfig
    from pema_adapters.training.parameter_groups import parameter_groups
    from pema_adapters.training.save import save_delta
    from pema_adapters.training.shrink import restore_embeddings, shrink_embeddings
    from pema_adapters.vocabulary import PartialVocabulary

_PUBLIC = {
    "PEMAConfig": "training.method.config",
    "PartialVocabulary": "vocabulary",
    "PemaError": "errors",
    "MemoryReport": "analysis.memory_report",
    "MergeReport": "merging.report",
    "load_model": "training.load_model",
    "memory_report": "analysis.memory_report",
    "merge_checkpoint": "merging.api",
    "parameter_groups": "training.parameter_groups",
    "push_merged_to_hub": "publishing.push",
    "restore_embeddings": "training.shrink",
    "save_delta": "training.save",
    "shrink_embeddings": "training.shrink",
    "undo_merge": "merging.api",
}

__all__ = [
    "MemoryReport", "MergeReport", "PEMAConfig", "PartialVocabulary", "PemaError", "load_model", "memory_report",
    "merge_checkpoint", "parameter_groups", "push_merged_to_hub", "restore_embeddings", "save_delta",
    "shrink_embeddings", "undo_merge",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


patches.register_on_import()
