"""Text from files is made safe for a terminal, for Markdown and for Python code."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_adapters.io.escaping import (
    escape_markdown,
    escape_terminal,
    format_code_block,
    format_code_span,
    format_python_literal,
)

HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "a\nverified: every byte",
    "\r\u202eevil\u2028",
    '"); import os; os.system("id") #',
    "\\",
    "```\n<script>",
    "<!-- pema: end -->",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("escape", [escape_terminal, escape_markdown, format_code_span, format_python_literal])
def test_text_becomes_one_printable_line(escape, text):
    assert escape(text).isprintable()


@given(st.text(st.characters(codec=None)))
def test_a_python_literal_evaluates_to_the_text(text):
    assert ast.literal_eval(format_python_literal(text)) == text


def test_a_python_literal_of_a_file_name_that_is_not_utf_8():
    name = b"\xff".decode(errors="surrogateescape")
    assert format_python_literal(name) == r'"\udcff"' and ast.literal_eval(format_python_literal(name)) == name


def test_long_text_keeps_its_ends():
    assert escape_terminal("a" * 2000 + "b" * 2000, 20) == "aaaaaaaaaa ... bbbbbbbbbb"


@pytest.mark.parametrize(
    ("text", "code"), [("a", "`a`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("```", "```` ``` ````"), (" a", "`  a `")]
)
def test_a_code_span_is_not_ended_by_backticks(text, code):
    assert format_code_span(text) == code


def test_a_code_block_is_not_ended_by_its_lines():
    assert format_code_block(["a", "```", "b\nc"], "python") == ["````python", "a", "```", r"b\nc", "````"]
