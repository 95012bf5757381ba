"""The token of the Hub, checked before the client puts it into a header, and into the error about that header."""

import os
import re

from pema_adapters.errors import MergeError

_SENT = re.compile(r"Bearer [!-~]+")


def check_token(token: str | bool | None) -> str | bool | None:
    """The token for the client, without the blanks and line breaks around one that was given.

    Args:
        token: one that was given; True or None for that of HF_TOKEN or `hf auth login`; False for none.

    Raises:
        MergeError: a token that no header can hold. The message does not hold it.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    token = token.strip() if isinstance(token, str) else token
    try:
        header = build_hf_headers(token=token).get("authorization")
    except (OSError, ValueError) as error:  # no token where True asks for one, or one on disk that is no text
        raise MergeError(f"no token can be read ({type(error).__name__}); {_advice(None)}") from None
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
