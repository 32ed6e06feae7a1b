"""Results: a table for the terminal, a part of a page in Markdown, a plot. The machine and the command are named."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from shoal.errors import UserError
from shoal.host.computer import describe_host


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.headings, tuple("---" for _ in self.headings), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def text(self) -> str:
        """In columns, for a terminal."""
        lines = [self.headings, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.headings))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


@dataclass(frozen=True)
class Report:
    """What a study found: `name` is that of its files and of its place in a page."""

    name: str
    title: str
    tables: tuple[Table, ...]
    notes: str = ""

    def text(self) -> str:
        """As text for a terminal."""
        return "\n\n".join(
            [self.title, *(table.text() for table in self.tables), *([self.notes] if self.notes else [])]
        )

    def markdown(self, *, command: str, plot: str | None) -> str:
        """As a part of a Markdown page, with how it was made: by `command`, on this machine, today."""
        made = f"`{command}`, {date.today()}, on {describe_host()}, Python {platform.python_version()}."
        picture = [f"![{self.title}]({plot})"] if plot else []
        notes = [self.notes] if self.notes else []
        return "\n\n".join([*(table.markdown() for table in self.tables), *notes, *picture, made])


def command_line() -> str:
    """The command that was given; of files, only the names."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return " ".join(["python -m shoal.simulator", *map(shlex.quote, words)])


def share(value: float | None) -> str:
    """A share of a bound, with two digits; `-` if there is none."""
    if value is None:
        return "-"
    return f"{value:.2f}".removeprefix("0") if 0 <= value < 1 else f"{value:.2f}"


def percent(value: float) -> str:
    """A share in percent, with one decimal below ten percent."""
    return f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"


def seconds(value: float | None) -> str:
    """A time in whole seconds; `-` if there is none."""
    return "-" if value is None else f"{value:.0f} s"


def write(report: Report, folder: Path, draw: Callable[[Any], None] | None, page: Path | None) -> None:
    """Write NAME.md and NAME.svg into a folder, and the first also into a page (`put_into_page`)."""
    folder.mkdir(parents=True, exist_ok=True)
    plot = None
    if draw is not None:
        plot = folder / f"{report.name}.svg"
        save_plot(draw, plot)
    text = report.markdown(command=command_line(), plot=None if plot is None else plot.name)
    (folder / f"{report.name}.md").write_text(text + "\n")
    if page is not None:
        near = report.markdown(
            command=command_line(), plot=None if plot is None else os.path.relpath(plot, page.parent)
        )
        put_into_page(page, report.name, near)


def put_into_page(page: Path, name: str, text: str) -> None:
    """Replace what is between the two comments of a study in a page. Raises `UserError` if they are not there."""
    begins, ends = f"<!-- {name}: written by the simulator -->", f"<!-- end of {name} -->"
    found = re.compile(re.escape(begins) + ".*?" + re.escape(ends), re.DOTALL)
    before = page.read_text()
    if not found.search(before):
        raise UserError(f"{page} has no place for {name}", hint=f"write {begins} and {ends} into it")
    page.write_text(found.sub(lambda _: f"{begins}\n\n{text}\n\n{ends}", before))


def save_plot(draw: Callable[[Any], None], path: Path) -> None:
    """Draw a figure and save it. Raises `UserError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise UserError("plots need matplotlib", hint="pip install 'shoal[simulator]', or leave out --out") from missing
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw(figure)
    figure.savefig(path, metadata={"Date": None})
