"""Text that comes from files and from the Hub, made safe for a terminal and for Markdown."""

import re

MAX_LENGTH = 1500
"""Characters of one line; of a longer one the middle is left out."""

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~<>&])")


def escape_terminal(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""One printable line: control characters, line breaks and bidirectional marks become escapes.

    `escape_terminal("a\x1b[2J\nb") == "a\\x1b[2J\\nb"`
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    half = max_length // 2
    return line if len(line) <= max_length else f"{line[:half]} ... {line[-half:]}"


def escape_markdown(text: str, max_length: int = MAX_LENGTH) -> str:
    r"""The same line as literal text in Markdown: no link, code, heading, table cell or HTML begins in it.

    `escape_markdown("<b>_x_</b>") == r"\<b\>\_x\_\</b\>"`
    """
    return _MARKDOWN.sub(r"\\\1", escape_terminal(text, max_length))
