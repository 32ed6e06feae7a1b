"""A swarm whose machines come and go, and whose servers choose blocks and move, in virtual time.

    a machine comes ─▶ reads the directory, chooses ─▶ loads ─▶ online ─▶ looks every 20 s ─▶ gone
                                                         ▲                   │ moves
                                                         └───────────────────┘

What is true and what others see differ: servers read the directory now and then, and the record of a server that
vanished is read for some time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from shoal.peers import ModelInfo, ServerState
from shoal.policy.machines.bound import throughput_bound
from shoal.policy.machines.machine import Machine
from shoal.policy.machines.throughput import block_throughputs, exact_throughput
from shoal.simulator.fluid.measures import Meter, Summary, Worth
from shoal.simulator.fluid.noticeboard import Noticeboard, server_info
from shoal.simulator.fluid.rules import Decision, Rule, Steward
from shoal.simulator.timeline import Timeline
from shoal.simulator.world.hardware import Hardware
from shoal.simulator.world.stays import Stay
from shoal.spans import Span

EPOCH = 1.7e9
"""The Unix time of the beginning: records hold Unix times."""


@dataclass(frozen=True)
class Delays:
    """How late servers know and do things, in seconds.

    A server reads the directory every `view` seconds; servers do that in `cohorts` groups, one after another. Each
    watches `watched` others, first those that hold blocks which few hold, and notices within `noticed` that one of them
    vanished; all others read the record of a vanished server for `vanish` seconds. That of one that leaves politely is
    gone at once; a part `polite` of all departures are. A server that moves hands its sessions over for `handover`
    seconds, during which it still serves, before it loads.
    """

    view: float = 20.0
    cohorts: int = 2
    watched: int = 16
    noticed: float = 2.0
    vanish: float = 50.0
    polite: float = 0.0
    handover: float = 2.0


@dataclass(frozen=True)
class Scene:
    """What is simulated: which machines are there when, for how long, and from when on it is measured.

    `hardware` gives the machine of a slot (`Stay.slot`). With `measure_every` seconds, throughput is computed at most
    that often; 0 computes it at each change. Holes are always exact.
    """

    num_blocks: int
    stays: Sequence[Stay]
    hardware: Callable[[int], Hardware]
    seconds: float
    warm_up: float = 0.0
    measure_every: float = 0.0
    delays: Delays = field(default_factory=Delays)


@dataclass(eq=False)
class Member:
    """A server in a simulation. It serves `span` if it is `online`; it loads it until `ready_at` otherwise."""

    peer: str
    hardware: Hardware
    zone: str
    up_since: float
    cohort: int
    span: Span
    online: bool = False
    claim: Span | None = None
    steward: Steward | None = None
    gone: bool = False
    looks_at: float | None = None
    moving: bool = False
    seen: int = -1
    """The version of the directory that it has looked at."""
    known_gone: set[str] = field(default_factory=set)
    """Vanished servers whose records are still there."""
    _machine: Machine | None = None

    def machine(self) -> Machine:
        """What it truly is."""
        if self._machine is None or self._machine.span != self.span:
            self._machine = self.hardware.machine(self.peer, self.span, zone=self.zone, up_since=self.up_since)
        return self._machine


class Watcher(Protocol):
    """Is told when servers begin and end to serve, at the moment when it happens."""

    def online(self, member: Member) -> None:
        """The server serves `member.span` from now on."""

    def handing_over(self, member: Member) -> None:
        """The server is about to move. It serves until `stopped`."""

    def stopped(self, member: Member) -> None:
        """The server does not serve `member.span` any more."""


class Arrangement:
    """One run of a scene with a rule. `advance` may be called several times; `summary` tells what was so far."""

    def __init__(self, scene: Scene, rule: Rule, *, seed: int, watchers: Sequence[Watcher] = ()) -> None:
        self.scene = scene
        self.rule = rule
        self.timeline = Timeline(now=EPOCH)
        self.board = Noticeboard(ModelInfo("simulated", "simulated", "simulated", scene.num_blocks))
        self.members: dict[str, Member] = {}
        self.meter = Meter(scene.num_blocks, begins=EPOCH + scene.warm_up)
        self._rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._bound: float | None = None
        self._copies = 0
        self._watchers = watchers
        self._measured_at = float("-inf")
        self._measure_is_due = False
        for index, stay in sorted(enumerate(scene.stays), key=lambda each: each[1].begins):
            if stay.ends > 0 and stay.begins < scene.seconds:
                self.timeline.at(EPOCH + stay.begins, lambda stay=stay, index=index: self._arrive(stay, index))  # type: ignore[misc]
        for cohort in range(scene.delays.cohorts):
            self.timeline.at(EPOCH + scene.delays.view * cohort / scene.delays.cohorts, self._reader(cohort))

    def advance(self, until: float) -> None:
        """Simulate up to the time `until`, in seconds after the beginning."""
        self.timeline.run_until(EPOCH + min(until, self.scene.seconds))

    def summary(self) -> Summary:
        """The figures so far."""
        return self.meter.summary(now=self.timeline.now)

    @property
    def now(self) -> float:
        """The virtual time."""
        return self.timeline.now

    # -- machines come and go ------------------------------------------------------------------------------------------

    def _arrive(self, stay: Stay, index: int) -> None:
        hardware = self.scene.hardware(stay.slot)
        peer, up_since = f"s{index:06d}", max(0.0, EPOCH + stay.begins)
        machine = hardware.machine(peer, None, zone=stay.zone, up_since=up_since)
        span = self.rule.join(machine, self.board.machines, self.scene.num_blocks, now=self.now, rng=self._rng)
        cohort = self._rng.randrange(self.scene.delays.cohorts)
        member = Member(peer, hardware, stay.zone, up_since, cohort, span)
        self.members[peer] = member
        self._copies += hardware.max_blocks
        self._bound = None
        self.timeline.at(EPOCH + stay.ends, lambda: self._depart(member))
        # A machine that is there from the beginning has loaded before.
        self._load(member, span, seconds=0.0 if stay.begins <= 0 else None)
        self._changed()

    def _depart(self, member: Member) -> None:
        watchers = self._watchers_of(member)
        member.gone = True
        del self.members[member.peer]
        self._copies -= member.hardware.max_blocks
        self._bound = None
        if member.online:
            self._stop(member)
        self.meter.departed(now=self.now)
        delays = self.scene.delays
        if self._rng.random() < delays.polite:
            self.board.remove(member.peer)
        else:
            self.timeline.after(delays.noticed, lambda: self._notice(member.peer, watchers))
            self.timeline.after(delays.vanish, lambda: self.board.remove(member.peer))
        self._changed()

    def _watchers_of(self, gone: Member) -> list[Member]:
        """Who watches a server: each server watches first those that hold blocks which few hold (the live rule)."""
        if not self.scene.delays.watched:
            return []
        mine = self.meter.fewest_holders(gone.span)
        ranks = [self.meter.fewest_holders(member.span) for member in self.members.values()]
        before, alike = sum(rank < mine for rank in ranks), sum(rank == mine for rank in ranks)
        part = (self.scene.delays.watched - before) / alike
        others = [member for member in self.members.values() if member is not gone]
        return others if part >= 1 else [member for member in others if self._rng.random() < part]

    def _notice(self, peer: str, watchers: Sequence[Member]) -> None:
        for member in watchers:
            member.known_gone.add(peer)
            member.seen = -1
        for member in watchers:
            self._look(member)

    # -- loading -------------------------------------------------------------------------------------------------------

    def _load(self, member: Member, span: Span, *, seconds: float | None) -> None:
        member.span = span
        freed = replace(member.machine(), span=None)
        takes = freed.seconds_to_load(span) if seconds is None else seconds
        if not takes:
            self._go_online(member)
            return
        self._publish(member, span, ServerState.JOINING, ready_at=self.now + takes)
        self.timeline.after(takes, lambda: self._go_online(member))

    def _go_online(self, member: Member) -> None:
        if member.gone:
            return
        moved = member.moving
        member.online, member.moving, member.claim = True, False, None
        self._publish(member, member.span, ServerState.ONLINE)
        if member.steward is None:
            member.steward = self.rule.steward(member.peer, self.scene.num_blocks, self._rng)
        elif moved:
            member.steward.arrived(now=self.now)
        self.meter.online(member.span, now=self.now)
        for watcher in self._watchers:
            watcher.online(member)
        self._changed()

    def _stop(self, member: Member) -> None:
        member.online = False
        self.meter.offline(member.span, now=self.now)
        for watcher in self._watchers:
            watcher.stopped(member)

    def _publish(
        self,
        member: Member,
        span: Span,
        state: ServerState,
        *,
        wants: Span | None = None,
        ready_at: float | None = None,
    ) -> None:
        info = server_info(
            member.peer,
            member.hardware,
            span,
            state,
            zone=member.zone,
            up_since=member.up_since,
            wants=wants,
            ready_at=ready_at,
        )
        self.board.publish(info, now=self.now)

    # -- looking and moving --------------------------------------------------------------------------------------------

    def _reader(self, cohort: int) -> Callable[[], None]:
        def read() -> None:
            due = [each for each in self.members.values() if each.cohort == cohort and each.seen != self.board.version]
            asked = self.rule.candidates(self.board.machines, self.scene.num_blocks, now=self.now) if due else None
            for member in due:
                if asked is None or member.peer in asked or member.known_gone or member.claim is not None:
                    self._look(member)
                else:
                    member.seen = self.board.version
            self.timeline.after(self.scene.delays.view, read)

        return read

    def _look(self, member: Member) -> None:
        if member.gone or not member.online or member.moving or member.steward is None:
            return
        member.seen = self.board.version
        machines = self.board.machines
        if member.known_gone:
            member.known_gone &= self.board.peers
        hidden = member.known_gone | {member.peer}
        others = [machine for machine in machines if machine.peer not in hidden]
        self._follow(member, member.steward.look(self.board.serving(member.peer), others, now=self.now))

    def _follow(self, member: Member, decision: Decision) -> None:
        if decision.goes is not None:
            self._move(member, decision.goes)
            return
        if decision.claims != member.claim:
            member.claim = decision.claims
            self._publish(member, member.span, ServerState.ONLINE, wants=decision.claims)
        look_at = decision.look_at
        if look_at is not None and self.now < look_at < math.inf and look_at != member.looks_at:
            member.looks_at = look_at
            self.timeline.at(look_at, lambda: self._look(member))

    def _move(self, member: Member, span: Span) -> None:
        member.moving = True
        self.meter.moved(now=self.now)
        machine = member.machine()
        if machine.keeps(span) is not None:
            self._load_while_serving(member, span, seconds=machine.seconds_to_load(span))
            return
        handover = self.scene.delays.handover
        ready_at = self.now + handover + machine.seconds_to_load(span)
        self._publish(member, span, ServerState.JOINING, ready_at=ready_at)
        for watcher in self._watchers:
            watcher.handing_over(member)

        def load() -> None:
            if not member.gone:
                self._stop(member)
                self._load(member, span, seconds=None)
                self._changed()

        self.timeline.after(handover, load)

    def _load_while_serving(self, member: Member, span: Span, *, seconds: float) -> None:
        self._publish(member, member.span, ServerState.ONLINE, wants=span, ready_at=self.now + seconds)

        def change() -> None:
            if member.gone:
                return
            before = member.span
            for watcher in self._watchers:
                watcher.handing_over(member)
                watcher.stopped(member)
            member.span = span
            self._go_online(member)
            self.meter.offline(before, now=self.now)

        self.timeline.after(seconds, change)

    # -- what it is worth ----------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """The swarm can do something else now: measure it soon, once for all changes of one moment."""
        if not self._measure_is_due:
            self._measure_is_due = True
            self.timeline.at(self._measured_at + self.scene.measure_every, self._measure)

    def _measure(self) -> None:
        self._measure_is_due = False
        self._measured_at = self.now
        blocks = self.scene.num_blocks
        if self._bound is None:
            present = [member.machine() for member in self.members.values()]
            self._bound = throughput_bound(present, blocks) if self._copies >= blocks else 0.0
        online = [member.machine() for member in self.members.values() if member.online]
        has_hole = self.meter.has_hole
        worth = Worth(
            exact=0.0 if has_hole else exact_throughput(online, blocks),
            minimum=0.0 if has_hole else min(block_throughputs(online, blocks)),
            bound=self._bound,
            num_machines=len(self.members),
            copies=self._copies / blocks,
        )
        self.meter.worth(worth, now=self.now)
