"""Cards: README.md files of the Hub, with metadata on top. One section is ours; whatever else is there survives."""

import re
from collections.abc import Mapping
from typing import Any

from pema_adapters.errors import FormatError

README = "README.md"
LIBRARY, ADAPTERS_LIBRARY = "transformers", "adapter-transformers"
"""What the Hub calls Transformers, and adapters."""
INHERITED = ("language", "license", "license_name", "license_link")
"""What a card takes over from the base's, where it says nothing itself."""
LISTS = ("tags", "datasets", "metrics", "language")
_BEGIN, _END = "<!-- pema: begin -->", "<!-- pema: end -->"
_OURS = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)


def metadata(text: str) -> dict[str, Any]:
    """The metadata of a card that is only read; {} where there is none that can be."""
    try:
        return _parsed(text)[0]
    except ValueError:
        return {}


def written(existing: str, repo_id: str, section: str, ours: Mapping[str, Any], inherited: Mapping[str, Any]) -> str:
    """A card with our section and metadata.

    Args:
        existing: the card that is there, "" for none. Its text stays but for our section of an earlier time; its
            metadata stay but for what `ours` says otherwise; lists are joined.
        repo_id: whose card it is; titles a new one.
        section: Markdown.
        ours: metadata. None: nothing to say.
        inherited: metadata for what neither has.

    Raises:
        FormatError: the metadata of `existing` cannot be read, so they would be lost.
    """
    from huggingface_hub import CardData
    from huggingface_hub.repocard import RepoCard

    try:
        old, text = _parsed(existing)
    except ValueError as error:
        raise FormatError(
            f"{repo_id}: README.md: its metadata cannot be read ({error}); mend the lines between its ---"
        ) from None
    made = {key: value for key, value in inherited.items() if key in INHERITED and value is not None} | old
    for key, value in ours.items():
        if value is not None:
            made[key] = _joined(made.get(key), value) if key in LISTS else value
    block = f"{_BEGIN}\n{section.strip()}\n{_END}"
    body = text.strip() or f"# {repo_id.rpartition('/')[2]}"
    body = _OURS.sub(lambda _: block, body, count=1) if _OURS.search(body) else f"{body}\n\n{block}"
    card = RepoCard(
        f"---\n{CardData(**made).to_yaml()}\n---\n\n{body}\n"
    )  # a ModelCard would drop or refuse results that it does not know
    return str(card.content)


def is_ours(text: str) -> bool:
    """Whether a card has a section of ours."""
    return _OURS.search(text) is not None


def _parsed(text: str) -> tuple[dict[str, Any], str]:
    """The metadata, losing nothing, and the text. Raises ValueError."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

    if not REGEX_YAML_BLOCK.search(text):
        return {}, text
    try:
        card = RepoCard(text)
    except Exception as error:  # whatever the YAML parser says
        raise ValueError(" ".join(str(error).split())[:200]) from None
    return dict(card.data.to_dict()), card.text  # type: ignore[no-untyped-call]


def _joined(old: Any, new: Any) -> list[Any]:
    both = [item for some in (old, new) for item in (some if isinstance(some, list) else [some]) if item is not None]
    return list(dict.fromkeys(str(item) for item in both))
