"""Text that is told as it comes, wrapped at words, with notes between its lines."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

INDENT = "  "


class Page:
    """Writes words into lines of the terminal's width."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = min(console.width, 80) - 2
        self._column = 0
        self._space = ""

    def write(self, text: str, style: str = "") -> None:
        """Go on with the text, at once."""
        for piece in re.split(r"(\s+)", text):
            if "\n" in piece:
                self.end_line()
                self._console.print("\n" * (piece.count("\n") - 1), end="")
            elif piece.isspace():
                self._space = " " if self._column else ""
            elif piece:
                if self._column and self._column + len(self._space + piece) > self._width:
                    self.end_line()
                self._put((self._space if self._column else INDENT) + piece, style)
                self._space = ""
        self._console.file.flush()

    def note(self, text: str, style: str) -> None:
        """A line of its own, after which the text goes on in the next."""
        self.end_line()
        self._console.print(Text(INDENT + text, style=style), soft_wrap=True)

    def end_line(self) -> None:
        if self._column:
            self._console.print()
            self._column = 0

    def _put(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), end="", soft_wrap=True)
        self._column += len(text)


class Teller:
    """A streamer for `generate()`: tells the words as they become whole.

    With each token it calls `before`, then writes what can be written, then calls `after`.
    """

    def __init__(
        self, tokenizer: Any, page: Page, *, before: Callable[[Teller], None], after: Callable[[Teller], None]
    ) -> None:
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self.told = ""
        self._tokenizer = tokenizer
        self._page = page
        self._before = before
        self._after = after
        self._is_prompt = True

    @property
    def is_mid_sentence(self) -> bool:
        return self.told.rstrip()[-1:] not in tuple(".!?\"'") and bool(self.told)

    def put(self, ids: Any) -> None:
        """What `generate()` calls with the prompt, and then with every token."""
        self.times.append(time.perf_counter())
        if self._is_prompt:
            self._is_prompt = False
            return
        self._before(self)
        self.token_ids += ids.flatten().tolist()
        text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        self._tell(text[: text.rfind(" ") + 1])  # the last word may not be whole yet
        self._after(self)

    def end(self) -> None:
        """What `generate()` calls at last."""
        self._tell(self._tokenizer.decode(self.token_ids, skip_special_tokens=True))
        self._page.end_line()

    def _tell(self, text: str) -> None:
        self._page.write(text[len(self.told) :])
        self.told = text if len(text) > len(self.told) else self.told
