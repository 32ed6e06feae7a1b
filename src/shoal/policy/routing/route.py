"""Which servers a client sends its tokens through, and why: routes are chosen and priced here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shoal.errors import MissingBlocks
from shoal.peers import ServerInfo
from shoal.policy.routing.balanced import balanced
from shoal.policy.routing.costs import SLOWEST, Costs, Hop, HopCost, Measured, Needs, announced_seconds, pass_seconds
from shoal.policy.routing.nsga2 import nsga2
from shoal.policy.routing.shortest import shortest
from shoal.policy.view import SwarmView, format_blocks
from shoal.spans import Span

if TYPE_CHECKING:
    import random

__all__ = [
    "SLOWEST",
    "Chooser",
    "Hop",
    "HopCost",
    "Measured",
    "Needs",
    "Route",
    "announced_seconds",
    "choose_route",
    "pass_seconds",
    "price_route",
]

Chooser = Literal["balanced", "shortest", "nsga2"]


@dataclass(frozen=True)
class Route:
    """The servers of a span in order, and what each hop costs a step.

    `back` are the seconds from the last server to the client, or to the server downstream of the span.
    """

    hops: tuple[Hop, ...]
    costs: tuple[HopCost, ...]
    back: float

    @property
    def seconds(self) -> float:
        """The seconds of a step, handicaps included."""
        return sum(cost.seconds for cost in self.costs) + self.back

    def explain(self) -> str:
        """One line that says what a step is expected to spend its time on, in milliseconds."""
        hops = (_explained(hop, cost) for hop, cost in zip(self.hops, self.costs, strict=True))
        back = f", back {_ms(self.back)}" if self.back else ""
        return f"{_ms(self.seconds)} ms a step: {', '.join(hops)}{back}"


def _explained(hop: Hop, cost: HopCost) -> str:
    parts = {"network": cost.network, "compute": cost.compute, "queue": cost.queue, "handicap": cost.handicap}
    name = hop.server.name or hop.server.peer[-8:]
    return f"{name} {hop.span} ({', '.join(f'{part} {_ms(each)}' for part, each in parts.items() if each)})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def choose_route(
    view: SwarmView,
    span: Span,
    *,
    needs: Needs,
    known: Measured,
    upstream: ServerInfo | None = None,
    downstream: ServerInfo | None = None,
    chooser: Chooser = "shortest",
    rng: random.Random | None = None,
) -> Route:
    """The fastest route over a span (arXiv 2312.08361, section 3.2), by the prices of `costs.py`.

    If the span is a part of an open ring, `upstream` and `downstream` are the servers before and after it; `None` is
    the client. The chooser "shortest" is exact. "balanced" is the same while the servers are idle; else it draws a
    route that shares the load and is hardly slower. It leaves single passes to the shortest: they are spread by the
    work that the client has in flight. "nsga2" weighs the time of a step against the load on the slowest server. Both
    draw with `rng`.

    Raises `MissingBlocks` with the blocks that no server of the view may compute.
    """
    if missing := view.missing(span):
        raise MissingBlocks(f"no server holds blocks {format_blocks(missing)}", blocks=missing)
    last = Span(span.end - 1, span.end)
    if needs.head and not view.offers_head(last.start):
        raise MissingBlocks(f"no server holds block {last} and the output head", blocks=last)
    costs = Costs(needs, known)
    if chooser == "shortest" or (chooser == "balanced" and not needs.session):
        hops = shortest(view, span, costs, upstream=upstream, downstream=downstream)
    elif rng is None:
        raise ValueError(f"the chooser {chooser!r} needs a source of randomness")
    elif chooser == "balanced":
        hops = balanced(view, span, costs, rng, upstream=upstream, downstream=downstream)
    else:
        hops = nsga2(view, span, costs, rng, upstream=upstream, downstream=downstream)
    return _priced(hops, costs, upstream, downstream)


def price_route(
    hops: Sequence[Hop],
    *,
    needs: Needs,
    known: Measured,
    upstream: ServerInfo | None = None,
    downstream: ServerInfo | None = None,
) -> Route:
    """The route over hops that were chosen before, with the prices of this moment."""
    return _priced(hops, Costs(needs, known), upstream, downstream)


def _priced(hops: Sequence[Hop], costs: Costs, upstream: ServerInfo | None, downstream: ServerInfo | None) -> Route:
    senders = (upstream, *(hop.server for hop in hops))
    priced = tuple(costs.hop(hop, sender) for hop, sender in zip(hops, senders, strict=False))
    return Route(tuple(hops), priced, costs.link(hops[-1].server, downstream))
