"""Loading a model with a partial embedding, for full fine-tuning with PEMA (the paper's setting)."""

from __future__ import annotations

from typing import Any

from pema_adapters.training.surgery import shrink_embeddings


def load_model(model_class: Any, pretrained_model_name_or_path: Any, vocabulary: Any, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)` with only the rows of `vocabulary`.

    The embedding is trainable as K rows, under its usual name; `save_delta` saves what training changed.

    Args:
        model_class: a Transformers model class or Auto class.
        pretrained_model_name_or_path: a local folder or a Hub id.
        vocabulary: a `PartialVocabulary`, or tokenized data to scan for one.
        kwargs: for `from_pretrained`.

    Returns:
        The model (with `output_loading_info=True` a pair, as from_pretrained returns).

    Raises:
        SurgeryError, VocabularyError: as `shrink_embeddings`.
    """
    loaded = model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    shrink_embeddings(model, None, vocabulary)
    return loaded
