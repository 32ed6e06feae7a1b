"""The simulated twin of a swarm of real processes: the same servers, links and clients."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from shoal.peers import ServerInfo, ServerState
from shoal.protocol import MAX_BLOCKS
from shoal.simulator.steps.client_view import ClientView
from shoal.simulator.steps.routing_client import Habits, RoutingClient, Talk, Tally
from shoal.simulator.steps.segment_server import Cores, Cost, SegmentServer
from shoal.simulator.timeline import Timeline
from shoal.spans import Span

Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]
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
    round_trips: tuple[tuple[Annotated[int, Field(ge=0, lt=10_000)], Seconds], ...] = ()


class RealRun(BaseModel):
    """Clients that decoded at the same time: what was asked, and what was measured."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_clients: Annotated[int, Field(ge=1, le=1000)]
    prompt: Annotated[int, Field(ge=1, le=100_000)]
    answer: Annotated[int, Field(ge=2, le=100_000)]
    tokens_per_second: Positive
    token_seconds: Positive
    first_token_seconds: Positive | None = None


class RealSwarm(BaseModel):
    """What was measured of a swarm of processes on one machine. `client_seconds` is a client's own time for a token.

    `hop_seconds` is what a message costs beyond links and computing.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    machine: str
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    num_cores: Annotated[int, Field(ge=1, le=10_000)]
    row_bytes: Positive
    client_seconds: Seconds
    hop_seconds: Seconds
    servers: Annotated[tuple[RealServer, ...], Field(min_length=1)]
    runs: Annotated[tuple[RealRun, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Predicted:
    """What the twin does in a run."""

    tokens_per_second: float
    token_seconds: float
    first_token_seconds: float


class _Links:
    """The twin's servers and links: a message takes half of the round trip that was measured between its two peers.

    Where none was, it crosses the link of the one that was dialled: clients dial all servers, and a server the next.
    """

    def __init__(self, timeline: Timeline, swarm: RealSwarm) -> None:
        cores = Cores(timeline, swarm.num_cores)
        self._timeline = timeline
        self._client_free_at = 0.0
        self._swarm = swarm
        self._real = {_peer(index): server for index, server in enumerate(swarm.servers)}
        self._between = _round_trips(swarm.servers)
        self._servers = {
            peer: SegmentServer(timeline, cost_of(server), cores=cores) for peer, server in self._real.items()
        }

    @property
    def infos(self) -> Sequence[ServerInfo]:
        """What the servers announce."""
        return [_info(peer, server) for peer, server in self._real.items()]

    def server(self, peer: str) -> SegmentServer | None:
        return self._servers[peer]

    def seconds(self, sender: str | None, receiver: str | None, rows: float) -> float:
        if sender == receiver:
            return 0.0
        dialled = self._real[receiver if receiver is not None else sender or ""]
        carried = 0.0
        if dialled.bytes_per_second is not None:
            carried = rows * self._swarm.row_bytes / dialled.bytes_per_second
        round_trip = dialled.round_trip
        if sender is not None and receiver is not None:
            round_trip = self._between.get((sender, receiver))
        delay = dialled.delay_seconds if round_trip is None else round_trip / 2
        travels = self._swarm.hop_seconds + delay + carried
        return travels if receiver is not None else self._at_client(travels)

    def _at_client(self, travels: float) -> float:
        """All clients are threads of one process, which does one thing at a time."""
        now = self._timeline.now
        self._client_free_at = max(now + travels, self._client_free_at) + self._swarm.client_seconds
        return self._client_free_at - now


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


def cost_of(server: RealServer) -> Cost:
    """What passes cost on a server, from its time for one token and for each of many."""
    blocks = len(Span.parse(server.span))
    per_row = min(server.row_seconds, server.token_seconds) / blocks
    return Cost(per_block=server.token_seconds / blocks - per_row, per_row=per_row)


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


def predict(swarm: RealSwarm, run: RealRun, *, seed: int = 0) -> Predicted:
    """Simulate a run: all clients begin together, and each decodes one answer."""
    timeline = Timeline()
    links = _Links(timeline, swarm)
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    reach = {info.peer: 2 * links.seconds(None, info.peer, 1) for info in links.infos}
    tallies: list[Tally] = []
    for _ in range(run.num_clients):
        tally = Tally()
        view = ClientView(swarm.num_blocks, lambda: links.infos, reach.__getitem__, rng)
        view.refresh()
        habits = Habits(lambda rng: Talk(run.prompt, run.answer, pause=float("inf")))
        tallies.append(tally)
        timeline.at(0.0, RoutingClient(timeline, links, view, habits, tally, rng).begin)
    timeline.run_until(float("inf"))
    gaps = [gap for tally in tallies for gap in tally.gaps]
    slowest = max(sum(tally.gaps) for tally in tallies)
    return Predicted(
        tokens_per_second=len(gaps) / slowest,
        token_seconds=statistics.median(gaps),
        first_token_seconds=statistics.median(first for tally in tallies for first in tally.first_tokens),
    )
