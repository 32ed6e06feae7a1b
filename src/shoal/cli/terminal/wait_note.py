"""What the client waits for, shown on the terminal while a text is being written, without a change to the text."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from shoal.cli.terminal import console as terminal
from shoal.cli.terminal.console import ProgressReporter
from shoal.events import Event, WaitEnded, WaitingForBlocks

if TYPE_CHECKING:
    from shoal.client.options.client_options import ClientOptions

MAKE_ROOM = "\x1bD\x1bM"
"""Down a line and up again, which scrolls where the cursor is in the last line. The column stays (VT100: IND, RI)."""
SAVE, RESTORE = "\x1b7", "\x1b8"
"""Remember where the cursor is, and go back there (DECSC, DECRC)."""
CLEAR_BELOW = "\x1b[1B\r\x1b[2K"
"""Go to the next line, and empty it."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class WaitNote:
    """An observer that shows the wait of a client (`WaitingForBlocks`, `WaitEnded`) in the line below the text.

    It shows one only `during` a call, and takes it away when the wait ends, or more of the text is about to be written
    (`hide`). The cursor stays where the text ends. Where stderr is not a terminal, the note is a line of its own, when
    the wait begins, now and then, and when it ends. Where the log shows warnings, there is no note: the log says it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or terminal.stderr
        self._lock = threading.Lock()  # observers are called on threads of their own
        self._waiting: WaitingForBlocks | None = None
        self._is_active = False
        self._is_shown = False
        self._progress: ProgressReporter | None = None
        self._task = ""

    def observing(self, client: ClientOptions) -> ClientOptions:
        """The options of a client that tells this observer too."""
        from dataclasses import replace

        return replace(client, observers=(*client.observers, self))

    def __call__(self, event: Event) -> None:
        match event:
            case WaitingForBlocks():
                with self._lock:
                    self._waiting = event
                    self._show()
            case WaitEnded(goes_on=goes_on, waited_seconds=seconds):
                with self._lock:
                    if self._waiting is not None and self._is_active and self._is_plain and goes_on:
                        self._print(f"going on after a wait of {seconds:.0f} s")
                    self._waiting = None
                    self._hide()

    @contextlib.contextmanager
    def during(self, progress: ProgressReporter | None = None, task: str = "") -> Iterator[None]:
        """Show waits while this is open; as a step of `task`, if there is a `progress` that shows that."""
        with self._lock:
            self._is_active, self._progress, self._task = True, progress, task
            self._show()
        try:
            yield
        finally:
            with self._lock:
                self._hide()
                self._is_active, self._progress = False, None

    def hide(self) -> None:
        """More of the text is about to be written."""
        with self._lock:
            self._hide()

    @property
    def _is_plain(self) -> bool:
        return not self._console.is_terminal or self._console.is_dumb_terminal

    def _show(self) -> None:
        if self._waiting is None or not self._is_active or logging.getLogger("shoal").isEnabledFor(logging.WARNING):
            return
        line = "".join(letter if letter.isprintable() else " " for letter in self._waiting.line)  # names are the peers'
        if self._is_plain:
            self._print(line)
        elif self._progress is not None:
            self._progress.show(self._task, step=line)
        else:
            note = Text(line)
            note.truncate(self._console.width - 1, overflow="ellipsis")  # a note of two lines would scroll the text
            dim, plain = (DIM, PLAIN) if self._console.color_system else ("", "")
            self._write(f"{MAKE_ROOM}{SAVE}{CLEAR_BELOW}{dim}{note.plain}{plain}{RESTORE}")
        self._is_shown = True

    def _hide(self) -> None:
        if not self._is_shown:
            return
        self._is_shown = False
        if self._is_plain:
            return
        if self._progress is not None:
            self._progress.show(self._task)
        else:
            self._write(f"{SAVE}{CLEAR_BELOW}{RESTORE}")

    def _print(self, line: str) -> None:
        self._console.print(Text(line, style="dim"), soft_wrap=True)

    def _write(self, codes: str) -> None:
        self._console.file.write(codes)  # in one piece: the text may be written by another thread
        self._console.file.flush()
