"""How tensors are called in checkpoints: embeddings, heads, and one name for what layouts spell differently."""

from collections.abc import Iterable

EMBEDDINGS = (
    "word_embeddings.weight",
    "embed_tokens.weight",
    "shared.weight",
    "wte.weight",
    "tok_embeddings.weight",
    "word_embedding.weight",
)
"""How the input embedding and its copies end in checkpoints; output embeddings end otherwise."""

OUTPUT_MATRICES = ("lm_head.weight", "decoder.weight", "vocab_projector.weight", "embed_out.weight", "output.weight")
OUTPUT_BIASES = ("predictions.bias", "decoder.bias", "lm_head.bias", "vocab_projector.bias", "final_logits_bias")
"""How matrices [V, d] and biases [V] or [1, V] of language-model heads end."""

_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def canonicalize(name: str, prefix: str) -> str:
    """The name by which a tensor is matched in any layout: no base-model prefix, today's spelling.

    `canonicalize("bert.embeddings.LayerNorm.gamma", "bert") == "embeddings.LayerNorm.weight"`
    """
    if prefix:
        name = name.removeprefix(prefix + ".")
    for old, new in _LEGACY.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def map_canonical_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """`{canonical name: stored name}`. Of a name stored in both ways, the prefixed one counts."""
    found: dict[str, str] = {}
    for name in names:
        key = canonicalize(name, prefix)
        if key not in found or name.startswith(prefix + "."):
            found[key] = name
    return found
