"""Model cards: README.md with YAML metadata on top. One section of a card is ours; all other text is kept."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError, reading
from pema_adapters.formats.versions import UNVERSIONED, check_version

README = "README.md"
LIBRARY, ADAPTERS_LIBRARY = "transformers", "adapter-transformers"
"""What the Hub calls Transformers, and adapters."""
INHERITED = ("language", "license", "license_name", "license_link")
"""What a card takes over from the base's, where it says nothing itself."""
LISTS = ("tags", "datasets", "metrics", "language")
MAX_BYTES = 1 << 20
"""At most so many bytes are read of a card whose metadata alone count."""
VERSION = 1
"""The version of our section, in a comment on its first line: what later versions need to tell old sections apart."""
_BEGIN, _END = "<!-- pema: begin -->", "<!-- pema: end -->"
_SECTION = re.compile(
    re.escape(_BEGIN) + r"(?:\s*<!-- pema: version (?P<version>\d{1,9}) -->)?.*?" + re.escape(_END), re.DOTALL
)
_METADATA = re.compile(r"\s*---[ \t]*[\r\n]+(.*?)[\r\n]+---[ \t]*(?:\r\n|\r|\n|\Z)", re.DOTALL)


def read_card(folder: Path) -> str:
    """README.md of a folder, at most its first `MAX_BYTES`; "" where there is none."""
    path = folder / README
    if not path.is_file():
        return ""
    with reading(path), path.open("rb") as file:
        return file.read(MAX_BYTES).decode(errors="replace")


def decode_card(content: bytes, where: str) -> str:
    """The text of a card that will be written again. Raises FormatError where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{where}: README.md is not UTF-8 (byte {error.start:,} of {len(content):,}), and rewriting it would lose "
            "text; convert it to UTF-8 first"
        ) from None


def parse_metadata(text: str) -> dict[str, Any]:
    """The metadata of a card that is only read; {} where there is none that can be."""
    try:
        return _split_card(text)[0]
    except ValueError:
        return {}


def render_card(
    existing: str, repo_id: str, section: str, ours: Mapping[str, Any], inherited: Mapping[str, Any]
) -> str:
    """A card with our section and metadata.

    Args:
        existing: the card that is there, "" for none. Its text stays but for our section of an earlier time; its
            metadata stay but for what `ours` says otherwise; lists are joined.
        repo_id: whose card it is; titles a new one.
        section: Markdown.
        ours: metadata. None: nothing to say.
        inherited: metadata for what neither has.

    Raises:
        FormatError: the metadata of `existing` cannot be read, so they would be lost; or its section of ours was
            written by a newer version of this package.
    """
    where = f"{repo_id}: {README}: "
    try:
        old, text = _split_card(existing)
    except ValueError as error:
        raise FormatError(f"{where}its metadata cannot be read ({error}); fix the YAML front matter") from None
    if found := _SECTION.search(text):
        check_version(int(found["version"] or UNVERSIONED), VERSION, where)
    made = {key: value for key, value in inherited.items() if key in INHERITED and _is_text(value)} | old
    for key, value in ours.items():
        if value is not None:
            made[key] = _merge_lists(made.get(key), value) if key in LISTS else value
    block = f"{_BEGIN}\n<!-- pema: version {VERSION} -->\n{_escape_comments(section.strip())}\n{_END}"
    body = text.strip() or f"# {repo_id.rpartition('/')[2]}"
    body = _SECTION.sub(lambda _: block, body, count=1) if found else f"{body}\n\n{block}"
    return f"---\n{_to_yaml(made)}---\n\n{body}\n"


def has_pema_section(text: str) -> bool:
    """Whether a card has a section of ours."""
    return _SECTION.search(text) is not None


def _escape_comments(section: str) -> str:
    """The section without HTML comments: a name in it that spells our end marker would end it early."""
    return section.replace("<!--", r"<\!--")


def _split_card(text: str) -> tuple[dict[str, Any], str]:
    """The metadata, losing nothing, and the text. Raises ValueError."""
    import yaml

    found = _METADATA.match(text)
    if not found:
        return {}, text
    try:
        data = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    if not isinstance(data or {}, dict):
        raise ValueError(f"expected a mapping, found {type(data).__name__}")
    return {key: value for key, value in (data or {}).items() if value is not None}, text[found.end() :]


def _to_yaml(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=1000))


def _is_text(value: Any) -> bool:
    """Whether a value of somebody else's metadata is text or a list of texts."""
    return all(isinstance(item, str) for item in (value if isinstance(value, list) else [value]))


def _merge_lists(old: Any, new: Any) -> list[Any]:
    """Join both into one list, without the items of `new` that are not text."""
    ours = [item for item in (new if isinstance(new, list) else [new]) if isinstance(item, str)]
    theirs = old if isinstance(old, list) else [] if old is None else [old]
    return [*theirs, *(item for item in dict.fromkeys(ours) if item not in theirs)]
