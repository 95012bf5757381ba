"""Names of tensors in checkpoints: embeddings, heads, and canonical names that match across layouts."""

from collections.abc import Iterable

EMBEDDINGS = (
    "word_embeddings.weight",
    "embed_tokens.weight",
    "shared.weight",
    "wte.weight",
    "tok_embeddings.weight",
    "word_embedding.weight",
)
"""Suffixes of the input embedding and its copies; output embeddings have others."""

OUTPUT_MATRICES = ("lm_head.weight", "decoder.weight", "vocab_projector.weight", "embed_out.weight", "output.weight")
OUTPUT_BIASES = ("predictions.bias", "decoder.bias", "lm_head.bias", "vocab_projector.bias", "final_logits_bias")
"""Suffixes of the matrix [V, d] and the bias [V] or [1, V] of language-model heads."""

_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def canonicalize(name: str, prefix: str) -> str:
    """Return the name by which a tensor matches in any layout: without base-model prefix, in today's spelling.

    `canonicalize("bert.embeddings.LayerNorm.gamma", "bert") == "embeddings.LayerNorm.weight"`
    """
    if prefix:
        name = name.removeprefix(prefix + ".")
    for old, new in _LEGACY.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def map_canonical_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Return `{canonical name: stored name}`; if a tensor is stored with and without prefix, the prefixed name."""
    found: dict[str, str] = {}
    for name in names:
        key = canonicalize(name, prefix)
        if key not in found or name.startswith(prefix + "."):
            found[key] = name
    return found
