"""Text from elsewhere is only text: on a terminal, in Markdown as a renderer reads it, in a table."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.table import Table

from lrsurgery.report.views.terminal import Paper
from lrsurgery.text import code, code_block, markdown, one_line, visible

TEXTS = st.text(alphabet=st.one_of(st.sampled_from("`*_[]<>|&#~$\\ \n\t\x1b\x07\u202ea1-+.!()"), st.characters()))
ESCAPES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@given(TEXTS)
def test_nothing_hidden_is_left(text: str) -> None:
    for shown in (visible(text), one_line(text), markdown(text), code(text)):
        assert not ESCAPES.search(shown)
    assert "\n" not in one_line(text)


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("transformer.h.0.mlp.c_fc", "/models/Größe (2)/模型", "m[v2]", "क्‍ष"):
        assert visible(name) == one_line(name) == name


@given(TEXTS)
def test_markdown_is_read_as_the_text(text: str) -> None:
    tokens = MarkdownIt().parse(f"x {markdown(text)}")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == f"x {one_line(text)}".rstrip()


@given(TEXTS)
def test_code_is_one_span(text: str) -> None:
    (_, inline, _) = MarkdownIt().parse(f"x {code(text)} y")
    spans = [child for child in inline.children or [] if child.type == "code_inline"]
    assert [span.content.strip() for span in spans] == [one_line(text).strip()]


@given(TEXTS)
def test_a_block_ends_where_it_ends(text: str) -> None:
    tokens = MarkdownIt().parse(f"{code_block(text, 'bash')}\n\nafter\n")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]


@pytest.mark.parametrize(
    "name", ["m[v2]", "y[/red]", "[bold]x", ":smile:", "\x1b]0;owned\x07\x1b[31mred", "a\rb", "\u202eevil", "\x9b31m"]
)
def test_a_name_on_a_console_is_only_a_name(name: str) -> None:
    out = io.StringIO()
    paper = Paper(file=out, force_terminal=True, width=200)
    table = Table(name, "other")
    table.add_row(name, "1")
    paper.print(table)
    paper.print(name, soft_wrap=True)
    shown = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # rich's own styles
    assert shown.count(visible(name)) == 3
    assert not ESCAPES.search(shown)
    assert "\x1b[31m" not in out.getvalue()
