"""`shoal plan` as a table: a column for each form of the weights, a row for each fact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from shoal.cli.terminal.console import UNKNOWN, figure
from shoal.peers import ServerInfo
from shoal.policy.machines.machine import machine_of
from shoal.policy.view import SwarmView, format_blocks
from shoal.policy.will_fit import DESKTOP, PROMPT_TOKENS, Hardware, Kind, Load, Plan

if TYPE_CHECKING:
    from shoal.model.weights.contents import Contents

MOST_KINDS = 12
"""Rows for machines of different sizes."""
GAP = 3
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class SwarmFacts:
    """What the servers of a swarm hold now and could hold, in blocks, and the blocks that none of them holds."""

    servers: int
    holds: int
    could_hold: int
    missing: tuple[int, ...]


@dataclass(frozen=True)
class Facts:
    """What a plan is made for. `servers` are those of the swarm, `None` without one.

    `own` are the free bytes of this machine, `round_trip` is in seconds. `stated` is how fast the user says that the
    machines are.
    """

    contents: Contents
    servers: tuple[ServerInfo, ...] | None
    kinds: tuple[Kind, ...]
    own: int
    round_trip: float
    dtype: str
    stated: Hardware | None = None

    @property
    def swarm(self) -> SwarmFacts | None:
        """The servers in short."""
        if self.servers is None:
            return None
        there, most = [each for each in self.servers if each.state.counts], self.contents.num_blocks
        machines = [each for server in there if (each := machine_of(server, now=0.0)) is not None]
        return SwarmFacts(
            servers=len(there),
            holds=sum(len(server.span) for server in there),
            could_hold=sum(min(each.max_blocks, most) if each.movable else len(each.span or ()) for each in machines),
            missing=tuple(SwarmView(most, tuple(there)).missing()),
        )


@dataclass(frozen=True)
class Form:
    """The plan for one form of the weights. `own_holds` are the blocks that this machine would hold."""

    quantization: str
    load: Load
    plan: Plan
    own_holds: int
    is_measured: bool


def render(facts: Facts, forms: Sequence[Form]) -> Iterator[RenderableType]:
    """The table, for 80 cells and more."""
    contents = facts.contents
    yield Text.assemble(
        (contents.name, "bold"), f"  {contents.num_blocks} blocks, {contents.model_type}  ", (contents.key, "dim")
    )
    yield from _about_swarm(facts)
    yield Text()
    yield _table(facts, forms)
    yield Text()
    yield from _verdict(facts, forms)


def short_size(nbytes: float) -> str:
    """A size as people write it: 8 GB, 24.5 GB, 620 kB."""
    for size, unit in _UNITS:
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}" if nbytes < 999.5 * size else f"{nbytes / size:,.0f} {unit}"
    return f"{nbytes:.0f} B"


def _about_swarm(facts: Facts) -> Iterator[Text]:
    if (swarm := facts.swarm) is None:
        return
    held, could = f"{swarm.holds} blocks", f"could hold {swarm.could_hold}"
    who = "The swarm's server holds" if swarm.servers == 1 else f"The swarm's {swarm.servers} servers hold"
    line = Text(f"{who} {held} and {could}; " if swarm.servers else "The swarm has no server of this model; ")
    missing = f"missing: {format_blocks(swarm.missing)}" if swarm.missing else "none is missing"
    yield line.append(missing, style="yellow" if swarm.missing else "green")


def _table(facts: Facts, forms: Sequence[Form]) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("")
    for form in forms:
        name = facts.contents.stored or (facts.dtype if form.quantization == "none" else form.quantization)
        table.add_column(name, justify="right", no_wrap=True)

    def row(title: str, of: Callable[[Form], str], style: str = "") -> None:
        table.add_row(Text(title), *(Text(of(form), style=style) for form in forms))

    def heading(title: str) -> None:
        table.add_row(Text(title, style="dim"))

    row("a block", lambda form: short_size(max(form.load.block_bytes)))
    row(f"all {facts.contents.num_blocks} blocks", lambda form: short_size(sum(form.load.block_bytes)))
    head = short_size(facts.contents.head_bytes(facts.dtype))
    row("the head, at each client", lambda form: head)
    row("cache of 1,000 tokens, a block", lambda form: short_size(1000 * form.load.cache_bytes))
    heading("blocks that fit")
    named = {kind.name for kind in facts.kinds}
    if "this machine" not in named:
        row(f"  this machine, {short_size(facts.own)} free (not planned)", lambda form: str(form.own_holds), "dim")
    for index, kind in enumerate(facts.kinds[:MOST_KINDS]):
        row(f"  {_kind(kind)}", lambda form, index=index: str(form.plan.holds[index]))  # type: ignore[misc]
    heading("together")
    row("  copies of the model", lambda form: f"{form.plan.copies:,.2f}")
    row("  blocks without a machine", lambda form: str(len(form.plan.missing) or "none"))
    if any(form.plan.missing for form in forms):
        for index, kind in enumerate(facts.kinds[:MOST_KINDS]):
            row(f"  more machines of {short_size(kind.free_bytes)}", lambda form, index=index: _more(form, index))  # type: ignore[misc]
    heading("expected, for one text")
    row("  machines in a row", lambda form: str(form.plan.num_hops or UNKNOWN))
    row("  tokens/s", lambda form: figure(form.plan.token_seconds and 1 / form.plan.token_seconds))
    row(f"  first token after {PROMPT_TOKENS}", lambda form: _seconds(form.plan.first_seconds))
    row("  cache of the smallest, tokens", lambda form: _count(form.plan.cache_tokens))
    return table


def _kind(kind: Kind) -> str:
    size = f"{kind.name}, {short_size(kind.free_bytes)} free" if kind.name == "this machine" else kind.name
    return size if kind.count == 1 else f"{kind.count} machines of {size}, each"


def _more(form: Form, index: int) -> str:
    if not form.plan.missing:
        return ""
    more = form.plan.more[index]
    return "too small" if more is None else str(more)


def _seconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _count(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


def _verdict(facts: Facts, forms: Sequence[Form]) -> Iterator[Text]:
    def names(chosen: Sequence[Form]) -> str:
        words = [facts.contents.stored or _option(form, facts) for form in chosen]
        return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)

    fitting = [form for form in forms if form.plan.fits]
    if not fitting:
        yield Text("It does not fit on these machines in any form.", style="bold red")
    else:
        yield Text(f"It fits on these machines in {names(fitting)}.", style="green")
    if moving := [form for form in fitting if form.plan.moves]:
        yield Text(f"In {names(moving)}, servers have to move to other blocks, which they do by themselves.")
    if not fitting:
        return
    trip = f"{facts.round_trip * 1e3:,.3g} ms from machine to machine and back"
    if all(form.is_measured for form in fitting):
        yield Text(f"Speeds: as this machine measured them for this model, and {trip}.", style="dim")
        return
    hardware = facts.stated or DESKTOP
    kind = "are assumed" if facts.stated is None else "are as stated"
    unless = ", where this machine has not measured them" if any(form.is_measured for form in fitting) else ""
    yield Text(
        f"Speeds {kind}{unless}: {hardware.bandwidth / 1e9:,.4g} GB/s of memory and {hardware.flops / 1e12:,.4g} "
        f"TFLOP/s in each new machine, and {trip}. A server measures its own.",
        style="dim",
    )


def _option(form: Form, facts: Facts) -> str:
    return facts.dtype if form.quantization == "none" else form.quantization
