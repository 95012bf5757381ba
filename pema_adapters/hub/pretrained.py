"""Load the tokenizer and the config of a pretrained model, and read V and d from them; no weights are read."""

from typing import Any

from pema_adapters.errors import FormatError

NEEDS_CODE = (
    "needs code from its repository, which is not run; read that code, then allow it with --trust-remote-code "
    "(trust_remote_code=True)"
)
WIDTH_KEYS = (
    "embedding_size",
    "word_embed_proj_dim",
    "hidden_size",
    "d_model",
)
"""Where a config has d; the first that is set counts."""


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder or Hub id, the fast one if there is one.

    Raises:
        FormatError: There is no tokenizer, or it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name, "tokenizer", trust_remote_code)


def count_tokenizer_rows(tokenizer: Any) -> int:
    """Return V as far as a tokenizer alone can tell: what its config says, else one row for each of its ids.

    The model may have more rows (padded to a multiple of 64, for example); K is the same.
    """
    stated = tokenizer.init_kwargs.get("embedding_rows")
    if isinstance(stated, int) and stated > 0:
        return stated
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """Load the config of a model in a folder or on the Hub; raises like `load_tokenizer`."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name, "model config", trust_remote_code)


def read_embedding_shape(name: str, trust_remote_code: bool = False) -> tuple[int, int]:
    """Return (V, d) of a model, read from its config.

    Raises:
        FormatError: There is no config, or it lacks V or d.
    """
    config = load_config(name, trust_remote_code).get_text_config()
    sizes = [getattr(config, width, None) for width in WIDTH_KEYS]
    rows, width = getattr(config, "vocab_size", None), next((size for size in sizes if size), None)
    if not rows or not width:
        raise FormatError(
            f"{name}: the model config has vocab_size {rows} and d {width} (looked for {', '.join(WIDTH_KEYS)}), "
            "expected two numbers; give a language model"
        )
    return rows, width


def _from_pretrained(kind: Any, name: str, what: str, trust_remote_code: bool) -> Any:
    """Load without a prompt: Transformers would run a repository's code if anything on stdin answers "y"."""
    try:
        return kind.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ImportError,
    ) as error:  # TypeError, AttributeError: JSON that is not an object
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise FormatError(f"{name}: the {what} {NEEDS_CODE}") from error
        said = " ".join(str(error).split())
        raise FormatError(f"{name}: no {what} found, here or on the Hub: {said}") from error
