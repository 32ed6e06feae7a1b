"""The note on what the client waits for: below the text, and gone without a trace."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

from shoal.cli.terminal.wait_note import WaitNote
from shoal.events import ServerLost, WaitEnded, WaitingForBlocks

WIDTH, HEIGHT = 40, 4
WAITING = WaitingForBlocks("m", (10, 11), "no server holds blocks 10:12 of m; mia loads them", 42.0, 0.0, 180.0)
ENDED = WaitEnded("m", (10, 11), 61.8, goes_on=True)


class Screen(io.StringIO):
    """What a terminal shows of what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = [[" "] * WIDTH for _ in range(HEIGHT)]
        self.row = self.column = 0
        self._saved = 0, 0

    def write(self, text: str) -> int:
        for code in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b.|.|\n|\r", text):
            self._take(code)
        return len(text)

    def _take(self, code: str) -> None:
        match code:
            case "\n":
                self.column = 0
                self._down()
            case "\x1bD":
                self._down()
            case "\x1bM":
                assert self.row > 0
                self.row -= 1
            case "\x1b7":
                self._saved = self.row, self.column
            case "\x1b8":
                self.row, self.column = self._saved
            case "\x1b[1B":
                self.row = min(self.row + 1, HEIGHT - 1)
            case "\r":
                self.column = 0
            case "\x1b[2K":
                self.lines[self.row] = [" "] * WIDTH
            case _ if code.startswith("\x1b["):
                assert code.endswith("m")  # a style
            case _:
                if self.column == WIDTH:
                    self.column = 0
                    self._down()
                self.lines[self.row][self.column] = code
                self.column += 1

    def _down(self) -> None:
        if self.row < HEIGHT - 1:
            self.row += 1
            return
        self.lines = [*self.lines[1:], [" "] * WIDTH]

    @property
    def shown(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    logger = logging.getLogger("shoal")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def on(screen: Screen) -> WaitNote:
    return WaitNote(Console(file=screen, force_terminal=True, width=WIDTH, height=HEIGHT))


@pytest.mark.parametrize("num_lines", [0, 1, 2, 3, 5], ids=lambda number: f"after {number} lines")
def test_a_note_is_below_the_text_and_the_text_goes_on_where_it_ended(num_lines: int):
    screen, plain = Screen(), Screen()
    before = "".join(f"line {index}\n" for index in range(num_lines)) + "Once upon"
    screen.write(before)
    plain.write(before)
    note = on(screen)
    with note.during():
        note(WAITING)
        row = next(index for index, line in enumerate(screen.shown) if line == "Once upon")
        assert screen.shown[row + 1].startswith("waiting: no server holds blocks 10:12")
        assert len(screen.shown[row + 1]) < WIDTH
        note(ENDED)
        assert not any("waiting" in line for line in screen.shown)
        for each in (screen, plain):
            each.write(" a time")
    text, whole = ([line for line in each.shown if line] for each in (screen, plain))
    assert text == whole[-len(text) :]
    assert text[-1] == "Once upon a time"
    assert len(text) >= min(len(whole), HEIGHT - 1)  # the note may have scrolled the screen by a line


def test_a_note_is_replaced_by_the_next_one_and_hidden_before_more_text_comes():
    screen = Screen()
    screen.write("Once")
    note = on(screen)
    with note.during():
        note(WAITING)
        note(WaitingForBlocks("m", (10,), "no server holds block 10", None, 15.0, 180.0))
        assert screen.shown[:2] == ["Once", "waiting for 15 s: no server holds bloc…"]
        note.hide()
        screen.write(" upon")
        assert screen.shown[:2] == ["Once upon", ""]


def test_a_wait_is_shown_only_during_a_call_also_if_it_began_before():
    screen = Screen()
    note = on(screen)
    note(WAITING)
    assert screen.shown == [""] * HEIGHT
    with note.during():
        assert screen.shown[1].startswith("waiting")
    assert screen.shown == [""] * HEIGHT
    note(ENDED)
    with note.during():
        assert screen.shown == [""] * HEIGHT


def test_without_a_terminal_the_wait_and_its_end_are_lines():
    file = io.StringIO()
    note = WaitNote(Console(file=file, width=WIDTH))
    with note.during():
        note(WAITING)
        note(ServerLost("peer", "it hung up"))
        note(ENDED)
    assert file.getvalue().splitlines() == [
        "waiting: no server holds blocks 10:12 of m; mia loads them (for 180 s at most)",
        "going on after a wait of 62 s",
    ]


def test_a_log_that_shows_the_wait_replaces_the_note():
    logging.getLogger("shoal").setLevel(logging.WARNING)
    screen = Screen()
    note = on(screen)
    with note.during():
        note(WAITING)
        assert screen.shown == [""] * HEIGHT


def test_what_a_peer_says_cannot_write_to_the_terminal():
    screen = Screen()
    note = on(screen)
    with note.during():
        note(WaitingForBlocks("m", (1,), "bad\x1b[2J\nname", None, 0.0, 5.0))
        assert screen.shown[1] == "waiting: bad [2J name (for 5 s at most)"
