"""Make text from files and from the Hub safe to print in a terminal, in Markdown and in Python code."""

import json
import re
from collections.abc import Iterable

MAX_LENGTH = 1500
"""Characters of one line; a longer line loses its middle."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~<>&])")
_BACKTICKS = re.compile("`+")


def escape_terminal(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""Return the text as one printable line, with control characters, line breaks and bidirectional marks escaped.

    `escape_terminal("a\x1b[2J\nb") == "a\\x1b[2J\\nb"`
    """
    line = _escape_line(text)
    half = max_length // 2
    return line if len(line) <= max_length else f"{line[:half]} ... {line[-half:]}"


def escape_markdown(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""Return the text as one line of literal Markdown: no link, code, heading, table cell or HTML begins in it.

    `escape_markdown("<b>_x_</b>") == r"\<b\>\_x\_\</b\>"`
    """
    return _MARKDOWN.sub(r"\\\1", escape_terminal(text, max_length))


def format_code_span(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""Return the text as a Markdown code span, whatever backticks it holds.

    `format_code_span("a`b") == "``a`b``"`
    """
    line = escape_terminal(text, max_length)
    fence = "`" * (1 + _count_backticks(line))
    pad = " " if line[:1] in ("`", " ", "") or line[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def format_code_block(lines: Iterable[str], language: str = "") -> list[str]:
    """Return the lines of a fenced Markdown code block that none of `lines` can end."""
    escaped = [_escape_line(line) for line in lines]
    fence = "`" * max(3, 1 + max(map(_count_backticks, escaped), default=0))
    return [fence + language, *escaped, fence]


def format_python_literal(text: str) -> str:
    r"""Return the text as a Python string literal: one printable line, safe in HTML comments too.

    `format_python_literal('a"\n<') == r'"a\"\n\x3c"'`
    """
    return _escape_line(json.dumps(text, ensure_ascii=False)).replace("<", r"\x3c")


def _escape_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _count_backticks(line: str) -> int:
    return max(map(len, _BACKTICKS.findall(line)), default=0)
