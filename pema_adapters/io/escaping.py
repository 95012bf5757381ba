"""Text that comes from files and from the Hub, made safe for a terminal, for Markdown, and for Python code."""

import json
import re
from collections.abc import Iterable

MAX_LENGTH = 1500
"""Characters of one line; of a longer one the middle is left out."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~<>&])")
_BACKTICKS = re.compile("`+")


def escape_terminal(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""One printable line: control characters, line breaks and bidirectional marks become escapes.

    `escape_terminal("a\x1b[2J\nb") == "a\\x1b[2J\\nb"`
    """
    line = _one_line(text)
    half = max_length // 2
    return line if len(line) <= max_length else f"{line[:half]} ... {line[-half:]}"


def escape_markdown(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""The same line as literal text in Markdown: no link, code, heading, table cell or HTML begins in it.

    `escape_markdown("<b>_x_</b>") == r"\<b\>\_x\_\</b\>"`
    """
    return _MARKDOWN.sub(r"\\\1", escape_terminal(text, max_length))


def markdown_code(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""The same line as a code span of Markdown, which no backtick in it can end.

    `markdown_code("a`b") == "``a`b``"`
    """
    line = escape_terminal(text, max_length)
    fence = "`" * (1 + _longest_run(line))
    pad = " " if line[:1] in ("`", " ", "") or line[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def markdown_code_block(lines: Iterable[str], language: str = "") -> list[str]:
    """Lines as a fenced code block of Markdown, which none of them can end."""
    escaped = [_one_line(line) for line in lines]
    fence = "`" * max(3, 1 + max(map(_longest_run, escaped), default=0))
    return [fence + language, *escaped, fence]


def python_literal(text: str) -> str:
    r"""Text as a string literal of Python, on one printable line that is safe in HTML comments, too.

    `python_literal('a"\n<') == r'"a\"\n\x3c"'`
    """
    return _one_line(json.dumps(text, ensure_ascii=False)).replace("<", r"\x3c")


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _longest_run(line: str) -> int:
    return max(map(len, _BACKTICKS.findall(line)), default=0)
