"""Check the Hub token before the client puts it into a header, and into its error about that header."""

import os
import re

from pema_adapters.errors import MergeError

_SENT = re.compile(r"Bearer [!-~]+")


def check_token(token: str | bool | None) -> str | bool | None:
    """Check a token and return it for the client, stripped of surrounding whitespace.

    Args:
        token: A token; True or None for that of HF_TOKEN or `hf auth login`; False for none.

    Raises:
        MergeError: No header can hold the token, or True was given and there is none. The message omits the token.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    token = token.strip() if isinstance(token, str) else token
    try:
        header = build_hf_headers(token=token).get("authorization")
    except (OSError, ValueError) as error:  # True without a token, or a token file that is not text
        raise MergeError(f"the token cannot be read ({type(error).__name__}); {_advice(None)}") from None
    if header is None or _SENT.fullmatch(header):
        return token
    value = header.removeprefix("Bearer ")
    at = next((i for i, c in enumerate(value) if not "!" <= c <= "~"), None)
    found = "it is empty" if at is None else f"character {at + 1} of {len(value)} is not printable ASCII"
    raise MergeError(f"the token cannot be sent to the Hub: {found}; {_advice(token)}")


def _advice(token: str | bool | None) -> str:
    if isinstance(token, str):
        return "give --token as https://huggingface.co/settings/tokens shows it"
    if any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return "set HF_TOKEN as https://huggingface.co/settings/tokens shows it, or unset it"
    return "log in again (hf auth login)"
