"""What a scan needs to know of a pretrained model: its tokenizer, V and d. No weights are read."""

from typing import Any

from pema_adapters.errors import FormatError

NEEDS_CODE = (
    "needs code of its repository, which is not run; read that code, then allow it with --trust-remote-code "
    "(trust_remote_code=True)"
)
WIDTH_KEYS = (
    "embedding_size",
    "word_embed_proj_dim",
    "hidden_size",
    "d_model",
)  # d in a config; the first there counts


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load the fast tokenizer of a folder or Hub id, where there is one."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, name, "tokenizer", trust_remote_code)


def count_tokenizer_rows(tokenizer: Any) -> int:
    """V as far as a tokenizer alone can tell: what its config says, else one row for each of its ids.

    A model may have more rows than that (padded to a multiple of 64, say); K is the same for all that.
    """
    stated = tokenizer.init_kwargs.get("embedding_rows")
    if isinstance(stated, int) and stated > 0:
        return stated
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """Load the config of a model in a folder or on the Hub."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, name, "model config", trust_remote_code)


def read_embedding_shape(name: str, trust_remote_code: bool = False) -> tuple[int, int]:
    """Read V and d of a model from its config.

    Raises:
        FormatError: no config there, or one without these figures.
    """
    config = load_config(name, trust_remote_code).get_text_config()
    sizes = [getattr(config, width, None) for width in WIDTH_KEYS]
    rows, width = getattr(config, "vocab_size", None), next((size for size in sizes if size), None)
    if not rows or not width:
        raise FormatError(
            f"{name}: the model config has vocab_size {rows} and d {width} (looked for {', '.join(WIDTH_KEYS)}), "
            "expected two numbers: is this a language model?"
        )
    return rows, width


def _from_pretrained(kind: Any, name: str, what: str, trust_remote_code: bool) -> Any:
    """Load without asking: Transformers runs the code of a repository if somebody answers "y", or a pipe does."""
    try:
        return kind.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:  # the middle ones: JSON, no object
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise FormatError(f"{name}: the {what} {NEEDS_CODE}") from error
        said = " ".join(str(error).split())
        raise FormatError(f"{name}: no {what} found, here or on the Hub: {said}") from error
