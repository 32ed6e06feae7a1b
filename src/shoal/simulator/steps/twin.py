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
from shoal.simulator.steps.segment_server import Cores, Cost, SegmentServer
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

    What a token takes is all that is not the link: also messages and the client's part are spent on some server.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    span: Annotated[str, AfterValidator(_is_span)]
    token_seconds: Positive
    row_seconds: Positive
    delay_seconds: Seconds
    bytes_per_second: Positive | None = None


class RealRun(BaseModel):
    """Clients that decoded at the same time: the route of each, what was asked, and what was measured.

    `tokens_per_second` is the sum of what each had, `token_seconds` the mean of their median times for a token.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    routes: Annotated[tuple[Index, ...], Field(min_length=1, max_length=1000)]
    prompt: Annotated[int, Field(ge=1, le=100_000)]
    answer: Annotated[int, Field(ge=2, le=100_000)]
    tokens_per_second: Positive
    token_seconds: Positive


class RealSwarm(BaseModel):
    """What was measured of a swarm of processes on one machine.

    `routes` are lists of servers, each of which computes all blocks once. All processes share `num_cores`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    machine: str
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
    num_cores: Annotated[int, Field(ge=1, le=10_000)]
    row_bytes: Positive
    servers: Annotated[tuple[RealServer, ...], Field(min_length=1)]
    routes: Annotated[tuple[Annotated[tuple[Index, ...], Field(min_length=1)], ...], Field(min_length=1)]
    runs: Annotated[tuple[RealRun, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Predicted:
    """What the twin does in a run."""

    tokens_per_second: float
    token_seconds: float


class _Links:
    """The twin's servers and links. A message crosses the link of the server that it comes to, or leaves for a client.

    All servers of a route should have the same link: which of two servers has dialled the other is not known.
    """

    def __init__(self, timeline: Timeline, swarm: RealSwarm) -> None:
        cores = Cores(timeline, swarm.num_cores)
        self._timeline = timeline
        self._swarm = swarm
        self._real = {_peer(index): server for index, server in enumerate(swarm.servers)}
        self._servers = {
            peer: SegmentServer(timeline, cost_of(server), cores=cores) for peer, server in self._real.items()
        }

    @property
    def infos(self) -> Sequence[ServerInfo]:
        """What the servers announce."""
        return [_info(peer, server) for peer, server in self._real.items()]

    def server(self, peer: str) -> SegmentServer | None:
        return self._servers[peer]

    def deliver(self, sender: str | None, receiver: str | None, rows: float, arrive: Callable[[], None]) -> None:
        self._timeline.after(self.seconds(sender, receiver, rows), arrive)

    def seconds(self, sender: str | None, receiver: str | None, rows: float) -> float:
        """How long a message is on its way."""
        crossed = self._real[receiver if receiver is not None else sender or ""]
        if crossed.bytes_per_second is None:
            return crossed.delay_seconds
        return crossed.delay_seconds + rows * self._swarm.row_bytes / crossed.bytes_per_second


def _peer(index: int) -> str:
    return f"s{index:03d}"


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
    )


def summed_speed(arrivals: Sequence[Sequence[float]]) -> float:
    """The sum of the tokens per second of each client. `arrivals` are each client's, in seconds."""
    return sum((len(times) - 1) / (times[-1] - times[0]) for times in arrivals)


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
        summed_speed([list(accumulate(tally.gaps, initial=tally.first_tokens[0])) for tally in tallies]),
        statistics.mean(statistics.median(tally.gaps) for tally in tallies),
    )
