"""Generated text on the terminal: printed as it comes, wrapped between words, with notes between its lines."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

INDENT = "  "


class WrappedWriter:
    """Writes text in lines that fit the terminal and are at most 78 characters long."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = min(console.width, 80) - 2
        self._column = 0
        self._space = ""

    def write(self, text: str, style: str = "") -> None:
        """Append text, and show it immediately."""
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
        """Write a note on its own line. The text goes on in the next line."""
        self.end_line()
        self._console.print(Text(INDENT + text, style=style), soft_wrap=True)

    def end_line(self) -> None:
        """End the current line, if it is not empty."""
        if self._column:
            self._console.print()
            self._column = 0

    def _put(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), end="", soft_wrap=True)
        self._column += len(text)


class StoryStreamer:
    """A streamer for `generate()` that writes each word once it is complete.

    For each token it calls `before`, writes the words that are complete, and calls `after`. `times` are the moments, in
    seconds of `perf_counter`, at which the prompt and each token arrived.
    """

    def __init__(
        self,
        tokenizer: Any,
        writer: WrappedWriter,
        *,
        before: Callable[[StoryStreamer], None],
        after: Callable[[StoryStreamer], None],
    ) -> None:
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self.printed = ""
        self._tokenizer = tokenizer
        self._writer = writer
        self._before = before
        self._after = after
        self._is_prompt = True

    @property
    def is_mid_sentence(self) -> bool:
        """Whether the printed text does not end with a sentence."""
        return self.printed.rstrip()[-1:] not in tuple(".!?\"'") and bool(self.printed)

    def put(self, ids: Any) -> None:
        """Take the prompt, and then each token. Called by `generate()`."""
        self.times.append(time.perf_counter())
        if self._is_prompt:
            self._is_prompt = False
            return
        self._before(self)
        self.token_ids += ids.flatten().tolist()
        text = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        self._print(text[: text.rfind(" ") + 1])  # the last word may be incomplete
        self._after(self)

    def end(self) -> None:
        """Print the rest. Called by `generate()` at the end."""
        self._print(self._tokenizer.decode(self.token_ids, skip_special_tokens=True))
        self._writer.end_line()

    def _print(self, text: str) -> None:
        self._writer.write(text[len(self.printed) :])
        self.printed = text if len(text) > len(self.printed) else self.printed
