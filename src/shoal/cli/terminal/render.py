"""`shoal status` as text: one line for each server, and the number of servers of each block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from shoal.cli.terminal.console import UNKNOWN, figure, tokens_per_second
from shoal.peers import ServerInfo, ServerState, short
from shoal.policy.dtypes import computes_in, mixture
from shoal.policy.view import SwarmView, format_blocks
from shoal.protocol import PROTOCOL_VERSION, UPGRADE, speaks_other

if TYPE_CHECKING:
    from shoal.net.ping import PingAnswer
    from shoal.peers import ModelInfo
    from shoal.policy.routing.route import Route

    Answers = Mapping[str, PingAnswer | None]
    """What servers say that were asked, by peer id; None of one that does not answer. Others were not asked."""

STATE_STYLES = {
    ServerState.JOINING: "yellow",
    ServerState.ONLINE: "green",
    ServerState.UNREACHABLE: "bold red",
    ServerState.LEAVING: "dim",
}
SILENT = "silent"
"""The state of a server that does not answer, whatever it announces."""
MAX_BAR, MIN_BAR = 32, 8
"""Cells of the bar that shows where in the model a server's blocks are."""
MAX_NAME, SHORT_NAME = 16, 10
"""Cells of a server's name, and where the terminal is narrow."""
MAX_REASONS = 8
"""Lines about why servers took their blocks."""
ONLY_ATTENTION = "sdpa"
"""How servers compute attention whose devices have only one way."""
GAP = 2
"""Empty cells between two columns."""
BAR = "bar"
SHORTER_NAMES = "shorter names"

DROPPED_FIRST = (
    *("version", "cache", "prefill", "adapters", "head", "training", "queue"),
    *(SHORTER_NAMES, BAR, "tokens/s", "weights", "dtype"),
)
"""The columns that a narrow terminal does not show, in the order in which they are dropped. The others always stay."""

# Values that all servers have in common are printed once, above the table. Otherwise they are columns.
_USUALLY_EQUAL: dict[str, Callable[[ServerInfo], str]] = {
    "dtype": computes_in,
    "weights": lambda server: server.fingerprint[:8],
    "version": lambda server: server.version,
}

# These columns are shown if at least one server has a value.
_USUALLY_EMPTY: dict[str, Callable[[ServerInfo], str]] = {
    "queue": lambda server: str(server.queue_length) if server.queue_length else "",
    "head": lambda server: "yes" if server.head else "",
    "training": lambda server: "" if server.training else "no",
    "adapters": lambda server: str(len(server.adapters)) if server.adapters else "",
}


def usable(view: SwarmView, answers: Answers) -> SwarmView:
    """The servers that a token could go through: online, of this version of the protocol, and not silent."""
    return view.online().only(
        lambda server: server.protocol == PROTOCOL_VERSION and answers.get(server.peer, True) is not None
    )


def render(
    model: ModelInfo, view: SwarmView, answers: Answers, *, width: int, now: float = 0.0
) -> Iterator[RenderableType]:
    """One model of the swarm and its servers, for a terminal of `width` cells, at the Unix time `now`.

    Servers whose answer is `None`, or that speak another protocol, do not count: no token could go through them.
    """
    silent = {server.peer for server in view.servers if _is_silent(server, answers)}
    online = usable(view, answers)
    yield Text.assemble((model.name, "bold"), f"  {model.num_blocks} blocks, {model.family}  ", (model.key, "dim"))
    if not view.servers:
        yield Text("no server serves it", style="bold red")
        return
    values = {title: {of(server) for server in view.servers} for title, of in _USUALLY_EQUAL.items()}
    if shared := ", ".join(f"{title} {next(iter(v))}" for title, v in values.items() if len(v) == 1):
        yield Text(shared, style="dim")
    columns = {title: of for title, of in _USUALLY_EMPTY.items() if any(map(of, view.servers))}
    columns |= {title: _USUALLY_EQUAL[title] for title, found in values.items() if len(found) > 1}
    everything = _columns(view, columns, answers)
    shown = _fitting(everything, width)
    yield _table(shown, view, silent, spare=max(0, width - _width(shown)))
    if left_out := [title for title in everything if title not in shown and title != BAR]:
        yield Text(f"hidden in this width: {', '.join(left_out)} (see --json)", style="dim")
    yield _coverage(online)
    yield _verdict(view, online)
    yield from _lost(view, silent)
    yield from _apart(online)
    yield from _attentions(view)
    yield from _reasons(view, now)
    if (found := mixture(view.servers)) is not None:
        yield Text(f"servers with equal weights use different dtypes: {found}", style="yellow")


@dataclass(frozen=True)
class _Column:
    """The cells of a column, one for each server, with their styles."""

    cells: tuple[Text, ...]
    is_number: bool = False

    def width(self, title: str) -> int:
        return max(cell_len(title), *(cell.cell_len for cell in self.cells))


def _is_silent(server: ServerInfo, answers: Answers) -> bool:
    is_asked = server.state is ServerState.ONLINE and server.protocol == PROTOCOL_VERSION
    return is_asked and server.peer in answers and answers[server.peer] is None


def _columns(view: SwarmView, more: Mapping[str, Callable[[ServerInfo], str]], answers: Answers) -> dict[str, _Column]:
    """All columns, in their order. The bar has its smallest width."""
    servers = _in_order(view)

    def state(server: ServerInfo) -> str:
        answer = answers.get(server.peer)
        if _is_silent(server, answers):
            return SILENT
        return f"{server.state.value}, relayed" if answer is not None and answer.is_relayed else server.state.value

    def column(of: Callable[[ServerInfo], str], *, is_number: bool = False, is_colored: bool = False) -> _Column:
        styles = (_style(server, _is_silent(server, answers)) if is_colored else "" for server in servers)
        cells = (Text(of(server), style=style) for server, style in zip(servers, styles, strict=True))
        return _Column(tuple(cells), is_number)

    smallest = min(view.num_blocks, MIN_BAR)
    return {
        "server": column(lambda server: shortened(server.name or "-", MAX_NAME)),
        "peer": column(lambda server: server.peer[-6:]),
        "blocks": column(lambda server: str(server.span), is_number=True),
        BAR: column(lambda server: _span_bar(server, view.num_blocks, smallest), is_colored=True),
        "state": column(state, is_colored=True),
        "tokens/s": column(lambda server: figure(server.decode_speed), is_number=True),
        "prefill": column(lambda server: figure(server.prefill_speed), is_number=True),
        "cache": column(_cache_left, is_number=True),
    } | {title: column(of, is_number=title in ("queue", "adapters")) for title, of in more.items()}


def _fitting(columns: dict[str, _Column], width: int) -> dict[str, _Column]:
    """The columns that fit into `width` cells. Others are dropped in the order of `DROPPED_FIRST`."""
    for title in DROPPED_FIRST:
        if _width(columns) <= width:
            break
        if title == SHORTER_NAMES:
            names = tuple(Text(shortened(cell.plain, SHORT_NAME)) for cell in columns["server"].cells)
            columns = columns | {"server": _Column(names)}
        else:
            columns = {other: column for other, column in columns.items() if other != title}
    return columns


def _width(columns: Mapping[str, _Column]) -> int:
    return sum(column.width("" if title == BAR else title) + GAP for title, column in columns.items()) - GAP


def _style(server: ServerInfo, is_silent: bool) -> str:
    return "bold red" if is_silent else STATE_STYLES[server.state]


def _table(columns: Mapping[str, _Column], view: SwarmView, silent: Set[str], *, spare: int) -> Table:
    """The table. The bar grows by up to `spare` cells, the width that is left."""
    num_cells = min(view.num_blocks, MAX_BAR, MIN_BAR + spare)
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim", pad_edge=False)
    for title, column in columns.items():
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        table.add_column("" if title == BAR else title, justify=justify, no_wrap=title != "server")
    for index, server in enumerate(_in_order(view)):
        cells = {title: column.cells[index] for title, column in columns.items()}
        if BAR in cells:
            drawing = _span_bar(server, view.num_blocks, num_cells)
            cells[BAR] = Text(drawing, style=_style(server, server.peer in silent))
        table.add_row(*cells.values(), style="dim" if server.state is ServerState.LEAVING else "")
    return table


def _in_order(view: SwarmView) -> list[ServerInfo]:
    return sorted(view.servers, key=lambda server: (server.span, server.name, server.peer))


def _cache_left(server: ServerInfo) -> str:
    """The tokens that its cache has room for. A server that is joining has no cache yet."""
    return UNKNOWN if server.state is ServerState.JOINING else _short(server.cache_tokens_left)


def shortened(name: str, longest: int) -> str:
    """The name, cut to `longest` cells."""
    text = Text(name)
    text.truncate(longest, overflow="ellipsis")
    return text.plain


def render_route(route: Route | None, answers: Answers) -> Iterator[RenderableType]:
    """The route of a token, how each server is reached, and the time that each part is expected to take, in ms."""
    if route is None:
        yield Text("no route from this machine: blocks are missing, or their servers do not answer", style="bold red")
        return
    seconds = route.seconds
    rate = tokens_per_second(1 / seconds)
    yield Text(f"from this machine, a token is expected to take {seconds * 1e3:,.1f} ms ({rate})", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("server")
    table.add_column("peer", no_wrap=True)
    table.add_column("via", no_wrap=True)
    for title in ("blocks", "network ms", "compute", "queue", "handicap"):
        table.add_column(title, justify="right")
    before: ServerInfo | None = None
    carried = []
    for hop, cost in zip(route.hops, route.costs, strict=True):
        parts = (cost.network, cost.compute, cost.queue, cost.handicap)
        cells = (f"{part * 1e3:,.1f}" if part else "" for part in parts)
        name = Text(shortened(hop.server.name or "-", MAX_NAME))
        answer = answers.get(hop.server.peer)
        via = "relay" if answer is not None and answer.is_relayed else "direct"
        if before is not None and not before.reaches(hop.server):
            via = "carried"
            carried.append(f"from {_name(before)} to {_name(hop.server)}")
        before = hop.server
        table.add_row(name, Text(hop.server.peer[-6:]), via, str(hop.span), *cells)
    table.add_row("return trip", "", "", "", f"{route.back * 1e3:,.1f}", "", "", "")
    yield table
    if carried:
        yield Text(f"this machine carries what goes {', '.join(carried)}: they do not reach each other", style="yellow")


def _span_bar(server: ServerInfo, num_blocks: int, num_cells: int) -> str:
    cells = (range(i * num_blocks // num_cells, (i + 1) * num_blocks // num_cells) for i in range(num_cells))
    return "".join("█" if any(block in server.span for block in cell) else "·" for cell in cells)


def _coverage(online: SwarmView) -> Text:
    """The number of online servers of each block: one digit per block, in groups of ten blocks."""
    count = Counter(block for server in online.servers for block in server.span)
    text = Text("servers per block  ", style="dim")
    for block in range(online.num_blocks):
        if block and block % 10 == 0:
            text.append(" ")
        number = count[block]
        style = "bold red" if number == 0 else "yellow" if number == 1 else "green"
        text.append("·" if number == 0 else str(number) if number < 10 else "+", style=style)
    return text


def _verdict(view: SwarmView, online: SwarmView) -> Text:
    missing = online.missing()
    if not missing:
        return Text("complete: every block is served", style="green")
    text = Text(f"missing: blocks {format_blocks(missing)}", style="bold red")
    if loading := sorted(set(missing) - set(view.loading().missing())):
        text.append(f" ({format_blocks(loading)} loading)", style="yellow")
    return text


def _lost(view: SwarmView, silent: Set[str]) -> Iterator[Text]:
    """What is known of servers that announce themselves, and through which no token can go."""
    if silent:
        names = ", ".join(_name(server) for server in _in_order(view) if server.peer in silent)
        yield Text(f"do not answer this machine: {names}", style="red")
    unreachable = [server for server in _in_order(view) if server.state is ServerState.UNREACHABLE]
    if unreachable:
        names = ", ".join(map(_name, unreachable))
        yield Text(f"cannot be reached by others: {names}; `shoal doctor` there says what to do", style="red")
    for server in _in_order(view):
        if server.protocol != PROTOCOL_VERSION:
            yield Text(f"{_name(server)} {speaks_other(server.protocol)}: {UPGRADE}", style="red")


def _apart(online: SwarmView) -> Iterator[Text]:
    """Which servers do not reach others that may follow them in a route: a line for each of the first."""
    servers = {short(server.peer): server for server in online.servers}
    told = 0
    for server in (each for each in _in_order(online) if each.unreached):
        others = (servers[each] for each in server.unreached if each in servers)
        far = [_name(other) for other in others if other.span.end > server.span.end]
        if far and told < MAX_REASONS:
            yield Text(
                f"{_name(server)} does not reach {', '.join(far)}: clients carry what goes there", style="yellow"
            )
        told += bool(far)
    if told > MAX_REASONS:
        yield Text(f"and {told - MAX_REASONS} more (see --json)", style="yellow")


def _name(server: ServerInfo) -> str:
    return shortened(server.name or server.peer[-6:], MAX_NAME)


def _reasons(view: SwarmView, now: float) -> Iterator[Text]:
    """Why servers took their blocks, and when those that load will be ready: a line for each, those that load first."""
    told = [each for each in _in_order(view) if each.state is not ServerState.LEAVING and _tells(each)]
    told.sort(key=lambda server: not _is_loading(server))
    for server in told[:MAX_REASONS]:
        does = "loads" if server.state is ServerState.JOINING else "serves"
        line = Text(f"{_name(server)} {does} {server.span}", style="dim")
        if server.wants is not None:
            line.append(f", {'wants' if server.ready_at is None else 'loads'} {server.wants}")
        if _is_loading(server) and server.ready_at is not None:
            line.append(f", ready {_when(server.ready_at - now)}", style="yellow")
        if server.reason:
            line.append(f": {server.reason}")
        yield line
    if len(told) > MAX_REASONS:
        yield Text(f"and {len(told) - MAX_REASONS} more (see --json)", style="dim")


def _attentions(view: SwarmView) -> Iterator[Text]:
    """How servers compute attention, if not all of them in the only way that their devices have: a line for each."""
    ways: dict[str, list[ServerInfo]] = {}
    for server in _in_order(view):
        ways.setdefault(server.attention, []).append(server)
    for way, servers in ways.items():
        if way and way != ONLY_ATTENTION:
            names = ", ".join(map(_name, servers[:MAX_REASONS]))
            more = f" and {len(servers) - MAX_REASONS} more" if len(servers) > MAX_REASONS else ""
            yield Text(f"attention of {names}{more}: {way}", style="dim")


def _tells(server: ServerInfo) -> bool:
    is_ready_later = _is_loading(server) and server.ready_at is not None
    return is_ready_later or bool(server.reason and not server.pinned)


def _is_loading(server: ServerInfo) -> bool:
    return server.state is ServerState.JOINING or server.wants is not None


def _when(seconds: float) -> str:
    return "at any moment" if seconds < 1 else f"in {seconds:.0f} s" if seconds < 120 else f"in {seconds / 60:.0f} min"


def _short(number: int) -> str:
    """A number with a suffix: 1048576 as 1.0M."""
    for size, suffix in (10**9, "G"), (10**6, "M"), (10**3, "k"):
        if number >= size:
            return f"{number / size:.1f}{suffix}" if number < 10 * size else f"{number // size}{suffix}"
    return str(number)
