"""Model cards: read README.md with its YAML metadata, and add one section of ours, keeping all other text."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pema_adapters.errors import FormatError, reading
from pema_adapters.formats.versions import UNVERSIONED, check_version

README = "README.md"
LIBRARY, ADAPTERS_LIBRARY = "transformers", "adapter-transformers"
"""The values of `library_name` on the Hub for Transformers and for adapters."""
INHERITED = ("language", "license", "license_name", "license_link")
"""Metadata that a card inherits from the base's card, unless it has its own."""
LISTS = ("tags", "datasets", "metrics", "language")
MAX_BYTES = 1 << 20
"""How many bytes of a card are read if only its metadata matter."""
VERSION = 1
"""The version of our section, stored in a comment on its first line."""
_BEGIN, _END = "<!-- pema: begin -->", "<!-- pema: end -->"
_SECTION = re.compile(
    re.escape(_BEGIN) + r"(?:\s*<!-- pema: version (?P<version>\d{1,9}) -->)?.*?" + re.escape(_END), re.DOTALL
)
_METADATA = re.compile(r"\s*---[ \t]*[\r\n]+(.*?)[\r\n]+---[ \t]*(?:\r\n|\r|\n|\Z)", re.DOTALL)


def read_card(folder: Path) -> str:
    """Return README.md of a folder, at most its first `MAX_BYTES`; "" if there is none."""
    path = folder / README
    if not path.is_file():
        return ""
    with reading(path), path.open("rb") as file:
        return file.read(MAX_BYTES).decode(errors="replace")


def decode_card(content: bytes, where: str) -> str:
    """Decode a card that will be rewritten.

    Raises:
        FormatError: It is not UTF-8, so that rewriting it would lose text.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{where}: README.md is not UTF-8 (byte {error.start:,} of {len(content):,}), and rewriting it would lose "
            "text; convert it to UTF-8 first"
        ) from None


def parse_metadata(text: str) -> dict[str, Any]:
    """Return the metadata of a card, {} if there are none or they cannot be parsed."""
    try:
        return _split_card(text)[0]
    except ValueError:
        return {}


def render_card(
    existing: str, repo_id: str, section: str, ours: Mapping[str, Any], inherited: Mapping[str, Any]
) -> str:
    """Return a card with our section and metadata.

    Args:
        existing: The current card, "" for none. Its text is kept, except for an earlier section of ours; its metadata
            are kept, except for what `ours` replaces; lists are merged.
        repo_id: The repository, which also gives a new card its title.
        section: Our section, in Markdown.
        ours: Our metadata; a value of None is ignored.
        inherited: Metadata of the base's card, for keys that neither card has.

    Raises:
        FormatError: The metadata of `existing` cannot be parsed and would be lost, or its section of ours was written
            by a newer version of this package.
    """
    where = f"{repo_id}: {README}: "
    try:
        old, text = _split_card(existing)
    except ValueError as error:
        raise FormatError(f"{where}its metadata cannot be read ({error}); fix the YAML front matter") from None
    if found := _SECTION.search(text):
        check_version(int(found["version"] or UNVERSIONED), VERSION, where)
    body = _replace_section(text.strip() or f"# {repo_id.rpartition('/')[2]}", section)
    return f"---\n{_to_yaml(_merge_metadata(old, ours, inherited))}---\n\n{body}\n"


def has_pema_section(text: str) -> bool:
    """Return whether a card has a section of ours."""
    return _SECTION.search(text) is not None


def _merge_metadata(old: dict[str, Any], ours: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    merged = {key: value for key, value in inherited.items() if key in INHERITED and _is_text(value)} | old
    for key, value in ours.items():
        if value is not None:
            merged[key] = _merge_lists(merged.get(key), value) if key in LISTS else value
    return merged


def _replace_section(text: str, section: str) -> str:
    """Replace our section in the text, or append it."""
    block = f"{_BEGIN}\n<!-- pema: version {VERSION} -->\n{_escape_comments(section.strip())}\n{_END}"
    return _SECTION.sub(lambda _: block, text, count=1) if has_pema_section(text) else f"{text}\n\n{block}"


def _escape_comments(section: str) -> str:
    """Escape HTML comments: a name that spells our end marker would end the section early."""
    return section.replace("<!--", r"<\!--")


def _split_card(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata and its text.

    Raises:
        ValueError: The metadata are not valid YAML, or not a mapping.
    """
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
    """Return whether a value of foreign metadata is a string or a list of strings."""
    return all(isinstance(item, str) for item in (value if isinstance(value, list) else [value]))


def _merge_lists(old: Any, new: Any) -> list[Any]:
    """Append the strings of `new` that `old` lacks."""
    ours = [item for item in (new if isinstance(new, list) else [new]) if isinstance(item, str)]
    theirs = old if isinstance(old, list) else [] if old is None else [old]
    return [*theirs, *(item for item in dict.fromkeys(ours) if item not in theirs)]
