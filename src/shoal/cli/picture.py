"""A picture of who serves what: a line for each server, and how many of them hold each block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from shoal.routing.dtypes import computes_in, mixture
from shoal.routing.view import SwarmView, format_blocks
from shoal.spans import ServerInfo, ServerState

if TYPE_CHECKING:
    from shoal.net.transport import ModelInfo
    from shoal.routing.route import Route

STATE_STYLES = {ServerState.JOINING: "yellow", ServerState.ONLINE: "green", ServerState.LEAVING: "dim"}
WIDEST_PICTURE = 32
OTHER_COLUMNS = 60
"""What the columns beside the picture take."""

# What most swarms have in common is said once, above the table.
_SHARED: dict[str, Callable[[ServerInfo], str]] = {
    "dtype": computes_in,
    "weights": lambda server: server.fingerprint[:8],
    "version": lambda server: server.version,
}

# What few servers have is shown if one has it.
_REMARKABLE: dict[str, Callable[[ServerInfo], str]] = {
    "queue": lambda server: str(server.queue_length) if server.queue_length else "",
    "head": lambda server: "yes" if server.head else "",
    "training": lambda server: "" if server.training else "no",
    "adapters": lambda server: str(len(server.adapters)) if server.adapters else "",
}


def render(model: ModelInfo, view: SwarmView, *, width: int) -> Iterator[RenderableType]:
    """One model of the swarm, for a terminal of this width."""
    online = view.online()
    yield Text.assemble((model.name, "bold"), f"  {model.num_blocks} blocks, {model.family}  ", (model.key, "dim"))
    if not view.servers:
        yield Text("nobody serves it", style="bold red")
        return
    values = {title: {of(server) for server in view.servers} for title, of in _SHARED.items()}
    yield Text(", ".join(f"{title} {next(iter(v))}" for title, v in values.items() if len(v) == 1), style="dim")
    columns = {title: of for title, of in _REMARKABLE.items() if any(map(of, view.servers))}
    columns |= {title: _SHARED[title] for title, found in values.items() if len(found) > 1}
    yield _table(view, columns, num_cells=min(view.num_blocks, WIDEST_PICTURE, max(8, width - OTHER_COLUMNS)))
    yield _coverage(online)
    yield _verdict(view)
    if (found := mixture(view.servers)) is not None:
        yield Text(f"servers of equal weights compute differently: {found}", style="yellow")


def _table(view: SwarmView, columns: Mapping[str, Callable[[ServerInfo], str]], *, num_cells: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("server", overflow="ellipsis", max_width=16)
    table.add_column("peer")
    table.add_column("blocks", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("state")
    for title in ("tokens/s", "prefill", "cache"):
        table.add_column(title, justify="right")
    for title in columns:
        table.add_column(title, justify="right" if title in ("queue", "adapters") else "left")
    for server in sorted(view.servers, key=lambda server: (server.span, server.name, server.peer)):
        style = STATE_STYLES[server.state]
        table.add_row(
            server.name or "-",
            server.peer[-6:],
            str(server.span),
            Text(_span_picture(server, view.num_blocks, num_cells), style=style),
            Text(server.state.value, style=style),
            f"{server.decode_speed:,.0f}",
            f"{server.prefill_speed:,.0f}",
            _short(server.cache_tokens_left),
            *(of(server) for of in columns.values()),
            style="dim" if server.state is ServerState.LEAVING else "",
        )
    return table


def render_route(route: Route | None) -> Iterator[RenderableType]:
    """The way of a token, and where its time is expected to go."""
    if route is None:
        yield Text("there is no way from here: blocks are missing, or their servers do not answer", style="bold red")
        return
    seconds = route.seconds
    yield Text(f"from here, a token would take {seconds * 1e3:,.1f} ms, or {1 / seconds:,.1f} tokens/s", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("server", overflow="ellipsis", max_width=16)
    table.add_column("peer")
    for title in ("blocks", "network ms", "compute ms", "queue ms", "handicap ms"):
        table.add_column(title, justify="right")
    for hop, cost in zip(route.hops, route.costs, strict=True):
        parts = (cost.network, cost.compute, cost.queue, cost.handicap)
        cells = (f"{part * 1e3:,.1f}" if part else "" for part in parts)
        table.add_row(hop.server.name or "-", hop.server.peer[-6:], str(hop.span), *cells)
    table.add_row("and back", "", "", f"{route.back * 1e3:,.1f}", "", "", "")
    yield table


def _span_picture(server: ServerInfo, num_blocks: int, num_cells: int) -> str:
    cells = (range(i * num_blocks // num_cells, (i + 1) * num_blocks // num_cells) for i in range(num_cells))
    return "".join("█" if any(block in server.span for block in cell) else "·" for cell in cells)


def _coverage(online: SwarmView) -> Text:
    """How many servers hold each block: a digit a block, ten blocks a group."""
    count = Counter(block for server in online.servers for block in server.span)
    text = Text("servers of each block  ", style="dim")
    for block in range(online.num_blocks):
        if block and block % 10 == 0:
            text.append(" ")
        number = count[block]
        style = "bold red" if number == 0 else "yellow" if number == 1 else "green"
        text.append("·" if number == 0 else str(number) if number < 10 else "+", style=style)
    return text


def _verdict(view: SwarmView) -> Text:
    missing = view.online().missing()
    if not missing:
        return Text("complete: every block is served", style="green")
    text = Text(f"missing: blocks {format_blocks(missing)}", style="bold red")
    joining = view.only(lambda server: server.state is ServerState.JOINING)
    if coming := sorted(set(missing) - set(joining.missing())):
        text.append(f" ({format_blocks(coming)} are being loaded)", style="yellow")
    return text


def _short(number: int) -> str:
    """1048576 as 1.0M."""
    for size, suffix in (10**9, "G"), (10**6, "M"), (10**3, "k"):
        if number >= size:
            return f"{number / size:.1f}{suffix}" if number < 10 * size else f"{number // size}{suffix}"
    return str(number)
