"""`shoal status --contribution` as text: what this machine has computed for others, and others for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from shoal.ledgers.machine_totals import MachineTotals

MOST_PEERS = 15
"""The peers that have a line of their own."""
MIN_WHOLE = 88
"""From this many cells on, a terminal shows whole peer ids; they have about 52 characters."""
SHORT_ID = 10
GAP = 3
_UNITS = ((10**9, "P"), (10**6, "T"), (10**3, "G"), (1, "M"))


def render_contribution(totals: MachineTotals, *, width: int) -> Iterator[RenderableType]:
    """The sums by week, and those by peer, for a terminal of `width` cells."""
    if not totals.peers:
        yield Text("This machine has computed nothing for others in the last four weeks, nor others for it.")
        return
    yield Text("Work in parameter-tokens: a token through a billion parameters is 1 G.", style="dim")
    weeks = _table("week of")
    for week in totals.weeks:
        day = time.strftime("%Y-%m-%d", time.gmtime(week.begins))
        weeks.add_row(Text(day), amount(week.given), amount(week.taken))
    weeks.add_row(Text("all", style="bold"), amount(totals.given), amount(totals.taken), style="bold")
    yield weeks
    yield Text()
    peers = _table("peer")
    for each in totals.peers[:MOST_PEERS]:
        name = each.peer if width >= MIN_WHOLE else f"…{each.peer[-SHORT_ID:]}"
        peers.add_row(Text(name), amount(each.given), amount(each.taken))
    others = totals.peers[MOST_PEERS:]
    if others:
        given, taken = sum(each.given for each in others), sum(each.taken for each in others)
        peers.add_row(Text(f"{len(others)} others", style="dim"), amount(given), amount(taken))
    yield peers


def amount(work: int) -> Text:
    """An amount of work, given in millions of parameter-tokens, with three digits and its unit."""
    if not work:
        return Text("-", style="dim")
    size, unit = next((size, unit) for size, unit in _UNITS if work >= size)
    value = work / size
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return Text(f"{value:,.{digits}f} {unit}")


def _table(first: str) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    table.add_column("for others", justify="right", no_wrap=True)
    table.add_column("for us", justify="right", no_wrap=True)
    return table
