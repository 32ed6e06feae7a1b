"""A story on the terminal, while it is told."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shoal.cli.story import INDENT, Page


def page_of(width: int = 40) -> tuple[Page, io.StringIO]:
    out = io.StringIO()
    return Page(Console(file=out, width=width)), out


@given(st.lists(st.text("ab \n", max_size=12), max_size=40))
def test_lines_are_wrapped_and_nothing_is_lost(pieces):
    page, out = page_of()
    for piece in pieces:
        page.write(piece)
    page.end_line()
    assert "".join(out.getvalue().split()) == "".join("".join(pieces).split())
    assert all(line == line.rstrip() for line in out.getvalue().splitlines())


def test_a_note_stands_on_a_line_of_its_own():
    page, out = page_of()
    page.write("the fox was ")
    page.note("a note", style="red")
    page.write("brave")
    page.end_line()
    assert out.getvalue() == f"{INDENT}the fox was\n{INDENT}a note\n{INDENT}brave\n"
