"""Will a model fit on some machines: what each would hold, what would be missing, and how fast it would be.

This is the reckoning of `shoal plan`. A machine holds what a server of this size would choose
(`shoal.policy.machines.max_blocks`), and a step costs what a client expects of a route (`shoal.policy.routing.costs`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from shoal.peers import ServerInfo, ServerState, short
from shoal.policy.machines.machine import machine_of
from shoal.policy.machines.max_blocks import cache_tokens, choose_num_blocks
from shoal.policy.machines.speed_profile import MAX_SPEED, SpeedProfile
from shoal.policy.routing.route import Measured, Needs, Route, choose_route, price_route
from shoal.policy.view import SwarmView
from shoal.spans import Span

PROMPT_TOKENS = 256
"""The prompt whose first token is reckoned: what a client sends around the ring at once."""


@dataclass(frozen=True)
class Hardware:
    """How fast machines are of which no more is known: a desktop's processor, unless the user says another.

    While it decodes, a machine reads `bandwidth` bytes of its memory a second; while it reads a prompt, it computes
    `flops` operations a second.
    """

    bandwidth: float = 25e9
    flops: float = 2e11


DESKTOP = Hardware()


@dataclass(frozen=True)
class Load:
    """What a model takes in one form, in bytes; `block_bytes` has each block of the model.

    A token takes `cache_bytes` in the cache of each block, and `output_bytes` beside them. To decode it, `read_bytes`
    of each block are read and, at the client, `head_bytes` of the output head. A block multiplies it with
    `used_weights` weights.
    """

    block_bytes: tuple[int, ...]
    cache_bytes: float
    output_bytes: float
    read_bytes: float
    head_bytes: float
    used_weights: float

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the model."""
        return len(self.block_bytes)

    def holds(self, free_bytes: int) -> int:
        """The most blocks that a server holds on a machine with this much free memory, as it chooses itself."""
        return choose_num_blocks(free_bytes, self.block_bytes)

    def cache_tokens(self, free_bytes: int, num_blocks: int) -> int:
        """For how many tokens a server with this many blocks makes a cache, on a machine with this much free memory."""
        taken = sum(sorted(self.block_bytes)[-num_blocks:])
        token_bytes = num_blocks * self.cache_bytes + self.output_bytes
        return cache_tokens(free_before=free_bytes, free_after=free_bytes - taken, token_bytes=token_bytes)


@dataclass(frozen=True)
class Kind:
    """`count` machines that are alike, each with `free_bytes` of free memory."""

    name: str
    free_bytes: int
    count: int = 1


@dataclass(frozen=True)
class Part:
    """The blocks that one machine has in a plan. `machine` is the kind of it, or the name of a server that moves."""

    machine: str
    span: Span
    server: ServerInfo


@dataclass(frozen=True)
class Plan:
    """What becomes of a model on some machines.

    `holds` are the most blocks that one machine of each kind holds, and `more` how many more machines of each kind, and
    no others, would hold the `missing` blocks: `None` if none of them would. `parts` are the blocks of the machines
    that the plan needs, and of the servers that it `moves`. All machines together hold `copies` of the model.

    A token of one text takes `token_seconds` through `num_hops` machines, and the first one after a prompt of
    `PROMPT_TOKENS` takes `first_seconds`; all are `None` while blocks are missing. Of the machines that join, the one
    with the smallest cache has room for `cache_tokens` tokens; `None` if the plan needs none of them.
    """

    holds: tuple[int, ...]
    more: tuple[int | None, ...]
    parts: tuple[Part, ...]
    moves: bool
    missing: tuple[int, ...]
    copies: float
    num_hops: int | None
    token_seconds: float | None
    first_seconds: float | None
    cache_tokens: int | None

    @property
    def fits(self) -> bool:
        """Whether every block has a machine."""
        return not self.missing


@dataclass(frozen=True)
class _Spare:
    """A machine that may take blocks: one of a `kind`, or a `server` that may move."""

    holds: int
    kind: Kind | None = None
    server: ServerInfo | None = None


def make_plan(
    load: Load,
    kinds: Sequence[Kind],
    servers: Iterable[ServerInfo] = (),
    *,
    round_trip: float,
    speed: SpeedProfile | Hardware = DESKTOP,
    now: float = 0.0,
) -> Plan:
    """The plan for a model in one form, for machines that would join, and for servers that are there, at `now`.

    Blocks that servers have stay with them if the machines hold the others. Otherwise the servers that can move take
    part as the machines do, with as many blocks as they announce that they could hold. `speed` is that of each machine:
    passes that were measured with this model in this form, or what is assumed. `round_trip` is the time in seconds from
    each machine to each other one and back, where servers announce no other; `now` is the Unix time.
    """
    there = [each for each in servers if each.state.counts]
    holds = tuple(load.holds(kind.free_bytes) for kind in kinds)
    joining = [
        _Spare(most, kind=kind)
        for kind, most in zip(kinds, holds, strict=True)
        for _ in range(min(kind.count, load.num_blocks))  # a plan never needs more of them
    ]
    movable, could_hold = [], 0
    for server in there:
        machine = machine_of(server, now=now)
        assert machine is not None
        could_hold += min(machine.max_blocks, load.num_blocks) if machine.movable else len(server.span)
        if machine.movable:
            movable.append(_Spare(machine.max_blocks, server=server))
    placed, missing = _placed(load.num_blocks, there, joining)
    staying, moves = there, False
    if missing and movable:
        pinned = [each for each in there if all(each is not spare.server for spare in movable)]
        elsewhere, still_missing = _placed(load.num_blocks, pinned, [*joining, *movable])
        if not still_missing:
            placed, missing, staying, moves = elsewhere, still_missing, pinned, True
    parts = tuple(_part(spare, span, load, speed, number=number) for number, (spare, span) in enumerate(placed))
    total = could_hold + sum(kind.count * most for kind, most in zip(kinds, holds, strict=True))
    routes = None
    if not missing:
        routes = _route(load, staying, [part.server for part in parts], round_trip, speed)
    head = load.head_bytes / DESKTOP.bandwidth  # the client may be any machine
    rooms = [load.cache_tokens(spare.kind.free_bytes, len(span)) for spare, span in placed if spare.kind is not None]
    return Plan(
        holds=holds,
        more=tuple(_more(missing, most) for most in holds),
        parts=parts,
        moves=moves,
        missing=tuple(missing),
        copies=total / load.num_blocks,
        num_hops=None if routes is None else len(routes[0].hops),
        token_seconds=None if routes is None else routes[0].seconds + head,
        first_seconds=None if routes is None else routes[1].seconds + head,
        cache_tokens=min(rooms, default=None),
    )


def _placed(
    num_blocks: int, servers: Iterable[ServerInfo], spares: Sequence[_Spare]
) -> tuple[list[tuple[_Spare, Span]], list[int]]:
    """The blocks that the spare machines take of those that the servers lack, and those that are missing then.

    From the first block to the last, each gap goes to the smallest machine that fills it, or else to the largest one.
    Without servers there is one gap, and nothing is missing if the machines hold as many blocks as the model has.
    """
    missing = SwarmView(num_blocks, tuple(servers)).missing()
    waiting = sorted((each for each in spares if each.holds > 0), key=lambda each: each.holds)
    placed: list[tuple[_Spare, Span]] = []
    while missing and waiting:
        gap = next(_gaps(missing))
        index = bisect_left(waiting, len(gap), key=lambda each: each.holds)
        spare = waiting.pop(min(index, len(waiting) - 1))
        span = Span(gap.start, min(gap.end, gap.start + spare.holds))
        placed.append((spare, span))
        missing = missing[len(span) :]
    return placed, missing


def _gaps(blocks: Sequence[int]) -> Iterator[Span]:
    """The spans that these blocks form, in order."""
    start = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1:
            yield Span(blocks[start], blocks[index - 1] + 1)
            start = index


def _more(missing: Sequence[int], holds: int) -> int | None:
    if not holds and missing:
        return None
    return sum(-(-len(gap) // holds) for gap in _gaps(missing))


def _part(spare: _Spare, span: Span, load: Load, speed: SpeedProfile | Hardware, *, number: int) -> Part:
    if spare.server is not None:
        server = _with_speeds(spare.server, load, speed)
        factor = len(server.span) / len(span)  # a block takes as long as before
        decode, prefill = (server.decode_speed or 0.0) * factor, (server.prefill_speed or 0.0) * factor
        moved = replace(server, span=span, decode_speed=decode, prefill_speed=prefill)
        return Part(server.name or server.peer[-6:], span, moved)
    assert spare.kind is not None
    decode, prefill = _speeds(load, len(span), speed)
    server = ServerInfo(
        peer=f"machine-{number:06d}",
        span=span,
        state=ServerState.ONLINE,
        fingerprint="",
        decode_speed=decode,
        prefill_speed=prefill,
        cache_tokens_left=0,
        dtype="",
        quantization="",
        version="",
    )
    return Part(spare.kind.name, span, server)


def _speeds(load: Load, num_blocks: int, speed: SpeedProfile | Hardware) -> tuple[float, float]:
    """Tokens per second of one text, and of a prompt, through this many blocks: as measured, or as assumed."""
    if isinstance(speed, SpeedProfile):
        return speed.decode_speed(num_blocks), speed.prefill_speed(num_blocks)
    decode = speed.bandwidth / max(1.0, num_blocks * load.read_bytes)
    prefill = speed.flops / max(1.0, 2 * num_blocks * load.used_weights)
    return min(MAX_SPEED, decode), min(MAX_SPEED, prefill)


def _with_speeds(server: ServerInfo, load: Load, speed: SpeedProfile | Hardware) -> ServerInfo:
    """A server with the speeds that it announces, or else those that a machine of unknown speed is assumed to have."""
    decode, prefill = _speeds(load, len(server.span), speed)
    return replace(server, decode_speed=server.decode_speed or decode, prefill_speed=server.prefill_speed or prefill)


def _route(
    load: Load,
    servers: Sequence[ServerInfo],
    joining: Sequence[ServerInfo],
    round_trip: float,
    speed: SpeedProfile | Hardware,
) -> tuple[Route, Route]:
    """The fastest route of a token, and the same one for a prompt."""
    all_servers = [*(_with_speeds(each, load, speed) for each in servers), *joining]
    links = tuple((short(each.peer), round_trip) for each in all_servers)
    new = {each.peer for each in joining}
    linked = tuple(replace(each, round_trips=links) if each.peer in new else each for each in all_servers)
    known = Measured({each.peer: round_trip for each in linked})
    view = SwarmView(load.num_blocks, linked)
    route = choose_route(view, Span(0, load.num_blocks), needs=Needs(), known=known)
    return route, price_route(route.hops, needs=Needs(step_tokens=PROMPT_TOKENS), known=known)
