"""Generated text, wrapped to the terminal."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shoal.cli.terminal.story import INDENT, WrappedWriter


def new_writer(width: int = 40) -> tuple[WrappedWriter, io.StringIO]:
    out = io.StringIO()
    return WrappedWriter(Console(file=out, width=width)), out


@given(st.lists(st.text("ab \n", max_size=12), max_size=40))
def test_lines_are_wrapped_and_nothing_is_lost(pieces):
    writer, out = new_writer()
    for piece in pieces:
        writer.write(piece)
    writer.end_line()
    assert "".join(out.getvalue().split()) == "".join("".join(pieces).split())
    assert all(line == line.rstrip() for line in out.getvalue().splitlines())


def test_a_note_stands_on_a_line_of_its_own():
    writer, out = new_writer()
    writer.write("the fox was ")
    writer.note("a note", style="red")
    writer.write("brave")
    writer.end_line()
    assert out.getvalue() == f"{INDENT}the fox was\n{INDENT}a note\n{INDENT}brave\n"
