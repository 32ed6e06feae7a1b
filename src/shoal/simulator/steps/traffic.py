"""Clients in a swarm that changes: servers are those of an arrangement, links follow from places."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from shoal.policy.routing.costs import HOP_OVERHEAD
from shoal.simulator.fluid.arrangement import Arrangement, Member, Scene
from shoal.simulator.fluid.rules import Rule
from shoal.simulator.steps.client_view import KEPT, READ_SECONDS, ClientView
from shoal.simulator.steps.routing_client import Habits, RoutingClient, Tally
from shoal.simulator.steps.segment_server import Cost, SegmentServer
from shoal.simulator.steps.training_client import TrainingClient
from shoal.simulator.world.places import Place

CLIENT_ROWS_PER_SECOND = 760.0
"""What a client's network carries: 100 Mbit/s, with hidden states of 16 KiB."""


@dataclass(frozen=True)
class Load:
    """The clients of the swarm: how many generate, how many train, and at how many places they are.

    Clients at one place read the directory together and keep `kept` records. They begin at random in the first `ramp`
    seconds.
    """

    num_clients: int
    habits: Habits
    num_places: int = 50
    num_training: int = 0
    ramp: float = 60.0
    kept: int = KEPT


class Traffic:
    """An arrangement with clients. It follows which servers serve."""

    def __init__(self, scene: Scene, rule: Rule, load: Load, *, seed: int) -> None:
        self.arrangement = Arrangement(scene, rule, seed=seed, watchers=[self])
        self.timeline = self.arrangement.timeline
        self.servers: dict[str, SegmentServer] = {}
        self.clients: list[RoutingClient] = []
        self.trainers: list[TrainingClient] = []
        self.tally = Tally()
        self._num_blocks = scene.num_blocks
        self._load = load
        self._rng = random.Random(f"clients {seed}")  # noqa: S311 - repeatable, not secret
        self._seed = seed
        self._links: dict[str, Uplink] = {}

    def start(self) -> None:
        """Let the clients begin from now on."""
        load, rng, now = self._load, self._rng, self.timeline.now
        self.tally.begins = now + load.ramp
        sites = [Site(self, Place.anywhere(rng), self._own_rng()) for _ in range(load.num_places)]
        for site in sites:
            self.timeline.at(now + rng.uniform(0, READ_SECONDS), site.read)
        for index in range(load.num_clients + load.num_training):
            site, begins = sites[index % len(sites)], now + rng.uniform(0, load.ramp)
            if index < load.num_clients:
                client = RoutingClient(self.timeline, site, site.view, load.habits, self.tally, self._own_rng())
                self.clients.append(client)
                self.timeline.at(begins, client.begin)
            else:
                trainer = TrainingClient(self.timeline, site, site.view, self._own_rng())
                self.trainers.append(trainer)
                self.timeline.at(begins, trainer.begin)

    def _own_rng(self) -> random.Random:
        return random.Random(self._rng.random())  # noqa: S311 - repeatable, not secret

    # -- servers -------------------------------------------------------------------------------------------------------

    def online(self, member: Member) -> None:
        per_block, per_row = member.hardware.block_seconds(len(member.span))
        self.servers[member.peer] = SegmentServer(self.timeline, Cost(per_block, per_row), held=member.span)
        self.link(member.peer).rows_per_second = member.hardware.network_speed

    def handing_over(self, member: Member) -> None:
        """The server still serves; clients take the handover for a stop when it comes, which is the slower way."""

    def stopped(self, member: Member) -> None:
        self.servers.pop(member.peer).stop()
        for client in self.clients:
            client.stopped(member.peer)
        for trainer in self.trainers:
            trainer.stopped(member.peer)

    def link(self, peer: str) -> Uplink:
        """The place and the network of a server; it is where it was if it comes back."""
        if peer not in self._links:
            rng = random.Random(f"{self._seed} {peer}")  # noqa: S311 - repeatable, not secret
            self._links[peer] = Uplink(Place.anywhere(rng))
        return self._links[peer]


@dataclass
class Uplink:
    """A peer's way into the network: its messages leave one after another."""

    place: Place
    rows_per_second: float = CLIENT_ROWS_PER_SECOND
    free_at: float = 0.0

    def leave(self, rows: float, *, now: float) -> float:
        """When a message that is sent now has left."""
        self.free_at = max(self.free_at, now) + rows / self.rows_per_second
        return self.free_at


class Site:
    """A place with clients, as their network: the links from here and between servers."""

    def __init__(self, traffic: Traffic, place: Place, rng: random.Random) -> None:
        self._traffic = traffic
        self._own = Uplink(place)
        self.view = ClientView(
            traffic._num_blocks,
            lambda: traffic.arrangement.board.servers,
            lambda peer: place.round_trip(traffic.link(peer).place),
            rng,
            kept=traffic._load.kept,
        )
        self.view.refresh()

    @property
    def read(self) -> Callable[[], None]:
        """Read the directory, now and every `READ_SECONDS`."""

        def again() -> None:
            self.view.refresh()
            self._traffic.timeline.after(READ_SECONDS, again)

        return again

    def server(self, peer: str) -> SegmentServer | None:
        return self._traffic.servers.get(peer)

    def deliver(self, sender: str | None, receiver: str | None, rows: float, arrive: Callable[[], None]) -> None:
        self._traffic.timeline.after(self._seconds(sender, receiver, rows), arrive)

    def _seconds(self, sender: str | None, receiver: str | None, rows: float) -> float:
        if sender == receiver:
            return 0.0
        one = self._own if sender is None else self._traffic.link(sender)
        other = self._own if receiver is None else self._traffic.link(receiver)
        now = self._traffic.timeline.now
        return one.leave(rows, now=now) - now + one.place.round_trip(other.place) / 2 + HOP_OVERHEAD
