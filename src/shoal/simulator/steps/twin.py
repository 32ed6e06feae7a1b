"""The simulated twin of a swarm of real processes: the same servers, links and clients."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from shoal.peers import ServerInfo, ServerState
from shoal.protocol import MAX_BLOCKS
from shoal.simulator.steps.client_view import ClientView
from shoal.simulator.steps.routing_client import Habits, RoutingClient, Talk, Tally
from shoal.simulator.steps.segment_server import Cores, Cost, OneAtATime, SegmentServer
from shoal.simulator.timeline import Timeline
from shoal.spans import Span

Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]
Index = Annotated[int, Field(ge=0, lt=10_000)]
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]


def _is_span(text: str) -> str:
    Span.parse(text)
    return text


class RealServer(BaseModel):
    """A server process: its span, what it takes for one token and for each of many, and its link, one way.

    `round_trip` is what clients have measured to it, and `round_trips` what it announces: pairs of another server's
    index and seconds. What is not there was never measured.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    span: Annotated[str, AfterValidator(_is_span)]
    token_seconds: Positive
    row_seconds: Positive
    delay_seconds: Seconds
    bytes_per_second: Positive | None = None
    round_trip: Seconds | None = None
    round_trips: tuple[tuple[Index, Seconds], ...] = ()


class RealRun(BaseModel):
    """Clients that decoded at the same time: the route of each, what was asked, and what was measured.

    `tokens_per_second` are those of all together, `token_seconds` the mean of their median times for a token.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    routes: Annotated[tuple[Index, ...], Field(min_length=1, max_length=1000)]
    prompt: Annotated[int, Field(ge=1, le=100_000)]
    answer: Annotated[int, Field(ge=2, le=100_000)]
    tokens_per_second: Positive
    token_seconds: Positive


class RealSwarm(BaseModel):
    """What was measured of a swarm of processes on one machine.

    `routes` are lists of servers, each of which computes all blocks once. `client_seconds` is a client's own time for a
    token; all clients are one process. `message_seconds` is what a server takes for a message in addition to computing,
    and `idle_round_trip` a round trip that crosses no link. Both processes also do work that no step waits for,
    such as on the copies of all outputs for the client: `client_background` and `message_background`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    machine: str
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    num_cores: Annotated[int, Field(ge=1, le=10_000)]
    row_bytes: Positive
    client_seconds: Seconds
    client_background: Seconds
    message_seconds: Seconds
    message_background: Seconds
    idle_round_trip: Seconds
    servers: Annotated[tuple[RealServer, ...], Field(min_length=1)]
    routes: Annotated[tuple[Annotated[tuple[Index, ...], Field(min_length=1)], ...], Field(min_length=1)]
    runs: Annotated[tuple[RealRun, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Predicted:
    """What the twin does in a run."""

    tokens_per_second: float
    token_seconds: float


class _Links:
    """The twin's servers and links: a message takes half of what a link has added to the round trip of its two peers.

    Where none was measured, it crosses the link of the one that was dialled: clients dial all servers, a server the
    next.
    """

    def __init__(self, timeline: Timeline, swarm: RealSwarm) -> None:
        cores = Cores(timeline, swarm.num_cores)
        self._timeline = timeline
        self._cores = cores
        self._client = OneAtATime(cores)
        self._swarm = swarm
        self._real = {_peer(index): server for index, server in enumerate(swarm.servers)}
        self._between = _round_trips(swarm.servers)
        self._servers = {
            peer: SegmentServer(timeline, cost_of(server, swarm.message_seconds), cores=cores)
            for peer, server in self._real.items()
        }

    @property
    def infos(self) -> Sequence[ServerInfo]:
        """What the servers announce."""
        return [_info(peer, server) for peer, server in self._real.items()]

    def server(self, peer: str) -> SegmentServer | None:
        return self._servers[peer]

    def deliver(self, sender: str | None, receiver: str | None, rows: float, arrive: Callable[[], None]) -> None:
        if receiver is None:  # the client's own part of a token begins
            self._timeline.after(self.seconds(sender, None, rows), lambda: self._take_in(arrive))
        else:
            self._timeline.after(self.seconds(sender, receiver, rows), arrive)
            self._cores.run(self._swarm.message_background, _nothing)

    def _take_in(self, arrive: Callable[[], None]) -> None:
        """A client, which is one process with all others, does its own part of a token."""
        self._client.run(self._swarm.client_seconds, arrive)
        self._client.run(self._swarm.client_background, _nothing)

    def seconds(self, sender: str | None, receiver: str | None, rows: float) -> float:
        """How long a message is on its way."""
        if sender == receiver:
            return 0.0
        dialled = self._real[receiver if receiver is not None else sender or ""]
        round_trip = dialled.round_trip
        if sender is not None and receiver is not None:
            round_trip = self._between.get((sender, receiver))
        delay = dialled.delay_seconds
        if round_trip is not None:
            delay = max(0.0, round_trip - self._swarm.idle_round_trip) / 2
        if dialled.bytes_per_second is None:
            return delay
        return delay + rows * self._swarm.row_bytes / dialled.bytes_per_second


def _nothing() -> None:
    """No step waits for what has been done."""


def _peer(index: int) -> str:
    return f"s{index:03d}"


def _round_trips(servers: Sequence[RealServer]) -> dict[tuple[str, str], float]:
    """The seconds of a round trip between two servers, in both directions. If they disagree, the longer time counts."""
    found: dict[tuple[str, str], float] = {}
    for index, server in enumerate(servers):
        for other, seconds in server.round_trips:
            for pair in ((_peer(index), _peer(other)), (_peer(other), _peer(index))):
                found[pair] = max(seconds, found.get(pair, 0.0))
    return found


def cost_of(server: RealServer, message_seconds: float = 0.0) -> Cost:
    """What passes cost on a server, from its time for one token and for each of many, and for the message of each."""
    blocks = len(Span.parse(server.span))
    per_row = min(server.row_seconds, server.token_seconds) / blocks
    return Cost(per_block=server.token_seconds / blocks - per_row, per_row=per_row + message_seconds / blocks)


def _info(peer: str, server: RealServer) -> ServerInfo:
    return ServerInfo(
        peer=peer,
        span=Span.parse(server.span),
        state=ServerState.ONLINE,
        fingerprint="twin",
        decode_speed=1 / server.token_seconds,
        prefill_speed=1 / server.row_seconds,
        cache_tokens_left=1 << 20,
        dtype="float32",
        quantization="none",
        version="twin",
        round_trips=tuple((_peer(index), seconds) for index, seconds in server.round_trips),
    )


def decoding_speed(arrivals: Sequence[Sequence[float]]) -> float:
    """Tokens per second of all clients together, while all of them decode. `arrivals` are each client's, in seconds."""
    start, end = max(each[0] for each in arrivals), min(each[-1] for each in arrivals)
    return sum(start < time <= end for each in arrivals for time in each) / (end - start)


def predict(swarm: RealSwarm, run: RealRun, *, seed: int = 0) -> Predicted:
    """Simulate a run: all clients begin together, and each decodes one answer on its route."""
    timeline = Timeline()
    links = _Links(timeline, swarm)
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    infos = links.infos
    reach = {info.peer: 2 * links.seconds(None, info.peer, 1) for info in infos}
    tallies: list[Tally] = []
    for route in run.routes:
        tally = Tally()
        here = [infos[index] for index in swarm.routes[route]]
        view = ClientView(swarm.num_blocks, partial(tuple, here), reach.__getitem__, rng)
        view.refresh()
        habits = Habits(lambda rng: Talk(run.prompt, run.answer, pause=float("inf")))
        tallies.append(tally)
        timeline.at(0.0, RoutingClient(timeline, links, view, habits, tally, rng).begin)
    timeline.run_until(float("inf"))
    return Predicted(
        decoding_speed([list(accumulate(tally.gaps, initial=tally.first_tokens[0])) for tally in tallies]),
        statistics.mean(statistics.median(tally.gaps) for tally in tallies),
    )
