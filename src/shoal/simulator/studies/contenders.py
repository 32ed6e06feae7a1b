"""What contribution earns where there is more to compute than there are servers: parts of the compute, and waits.

Persons take turns at servers by the rules that servers use (`shoal.policy.contribution`, `FairQueue`). Each person has
a network of its own, so each is one payer, however many identities it has; jobs take a second each, and a person has as
many jobs under way as its kind says, at random servers. What a server's owner has given and taken, and who has
acknowledged what, grows with the jobs.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.policy.batching.fair_queueing import FairQueue
from shoal.policy.contribution.credit import credits_of
from shoal.policy.contribution.priority import charged, weight_of
from shoal.simulator.studies.report import Report, Table, percent

INVENTED = 1e12
"""The work that identities of one person acknowledge to each other."""
SETTLE_SECONDS = 50.0
"""How often servers look at claims again."""
WARM_UP = 0.25
"""The part of the time that is not counted: at its beginning, no server knows any other."""
GIVES_SELDOM = 0.05


@dataclass(frozen=True)
class Kind:
    """What a person does. `num_jobs` are under way at a time, with `think_seconds` between two, on average.

    A person that `serves` has a server, which is up for this part of the time. It has `num_identities`, each of which
    acknowledges `INVENTED` work to all others. A person that `is_new_each_time` has a new identity for every job.
    """

    name: str
    serves: float = 0.0
    num_jobs: int = 2
    think_seconds: float = 0.0
    num_identities: int = 1
    is_new_each_time: bool = False


KINDS = (
    Kind("serves and takes", serves=1.0),
    Kind("serves, takes a quarter of that", serves=1.0, num_jobs=1, think_seconds=5.0),
    Kind("only takes"),
    Kind("only takes, as 30 identities that acknowledge each other", num_identities=30),
    Kind("only takes, each time as another", is_new_each_time=True),
    Kind("serves one time in 20, as 30 identities", serves=GIVES_SELDOM, num_identities=30),
)


@dataclass
class Person:
    """A person, its identities and what was computed for it."""

    kind: Kind
    number: int
    identities: list[str]
    waits: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The payer that its jobs count for."""
        return str(self.number)


@dataclass
class SimulatedOwner:
    """A server and what it knows. Jobs that wait are pairs of the time of arrival and the person."""

    person: Person
    used: FairQueue = field(default_factory=FairQueue)
    consumed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    credits: dict[str, float] = field(default_factory=dict)
    jobs: list[tuple[float, int, Person]] = field(default_factory=list)
    is_occupied: bool = False

    def weight(self, person: Person) -> float:
        """The weight of a person here."""
        behind = self.behind(person)
        return weight_of(sum(behind.values()), sum(self.consumed[each] for each in behind))

    def behind(self, person: Person) -> dict[str, float]:
        """The credits of the accounts that a person acts for."""
        return {each: self.credits[each] for each in person.identities if self.credits.get(each, 0.0) > 0}

    def take(self, *, with_weights: bool) -> tuple[float, Person]:
        """The next job, by the rule for prompts of equal length."""
        waiting = {person.name for _, _, person in self.jobs}
        weights = {person.name: self.weight(person) if with_weights else 1.0 for _, _, person in self.jobs}

        def key(index: int) -> tuple[int, float, float]:
            arrived, _, person = self.jobs[index]
            return self.used.turn_of(person.name, waiting), -weights[person.name], arrived

        arrived, _, person = self.jobs.pop(min(range(len(self.jobs)), key=key))
        self.used = self.used.charged({person.name: 1.0}, waiting=waiting, weights=weights)
        for account, work in charged(self.behind(person), 1.0).items():
            self.consumed[account] += work
        return arrived, person


@dataclass(frozen=True)
class Outcome:
    """What a kind of person got, on average: jobs in a second, and the seconds that a job waited for its turn."""

    kind: Kind
    rate: float
    wait: float


def study(
    *,
    seed: int,
    with_weights: bool = True,
    kinds: Sequence[Kind] = KINDS,
    per_kind: int = 6,
    seconds: float = 4000.0,
) -> list[Outcome]:
    """What each kind of person gets of servers for which all compete."""
    swarm = _Swarm(random.Random(seed), kinds, per_kind, with_weights=with_weights)  # noqa: S311 - nothing secret
    swarm.run(seconds)
    counted = seconds * (1 - WARM_UP)
    found = []
    for kind in kinds:
        waits = [wait for person in swarm.persons if person.kind is kind for wait in person.waits]
        found.append(Outcome(kind, len(waits) / counted / per_kind, sum(waits) / max(len(waits), 1)))
    return found


def report(seed: int) -> Report:
    """The same swarm with and without weights."""
    before, after = study(seed=seed, with_weights=False), study(seed=seed)
    fair = sum(each.rate for each in after) / len(after)
    rows = tuple(
        (
            new.kind.name,
            percent(old.rate / fair),
            percent(new.rate / fair),
            f"{old.wait:.1f} s",
            f"{new.wait:.1f} s",
        )
        for old, new in zip(before, after, strict=True)
    )
    headings = ("a person that", "compute, all alike", "by contribution", "wait, all alike", "by contribution")
    notes = "100 % is an equal part of all compute. Each kind has six persons; jobs take a second."
    return Report("contribution", "What contribution earns under contention", (Table(headings, rows),), notes)


class _Swarm:
    """The persons, their servers, and what happens next."""

    def __init__(self, rng: random.Random, kinds: Sequence[Kind], per_kind: int, *, with_weights: bool) -> None:
        self.persons = [
            Person(kind, number, [f"{number}.{each}" for each in range(kind.num_identities)])
            for number, kind in enumerate(each for each in kinds for _ in range(per_kind))
        ]
        self.servers = [SimulatedOwner(person) for person in self.persons if person.kind.serves]
        self._rng = rng
        self._with_weights = with_weights
        self._given: dict[tuple[str, str], float] = defaultdict(float)  # what the second identity took from the first
        self._now, self._count, self._until = 0.0, 0, 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self._until = seconds
        for person in self.persons:
            for _ in range(person.kind.num_jobs):
                self._after(self._rng.random(), lambda person=person: self._ask(person))  # type: ignore[misc]
        self._settle()
        while self._agenda and self._now < seconds:
            self._now, _, act = heapq.heappop(self._agenda)
            act()

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._agenda, (self._now + seconds, self._count, act))

    def _ask(self, person: Person) -> None:
        """A person sends its next job to a server that is up, and not its own."""
        if person.kind.is_new_each_time:
            person.identities = [f"{person.number}.{self._count}"]
        up = [
            each for each in self.servers if each.person is not person and self._rng.random() < each.person.kind.serves
        ]
        if not up:
            self._after(1.0, lambda: self._ask(person))
            return
        server = self._rng.choice(up)
        self._count += 1
        server.jobs.append((self._now, self._count, person))
        self._begin(server)

    def _begin(self, server: SimulatedOwner) -> None:
        if server.is_occupied or not server.jobs:
            return
        server.is_occupied = True
        arrived, person = server.take(with_weights=self._with_weights)
        if self._now >= WARM_UP * self._until:
            person.waits.append(self._now - arrived)

        def end() -> None:
            server.is_occupied = False
            self._given[server.person.identities[0], person.identities[0]] += 1.0
            kind = person.kind
            pause = self._rng.expovariate(1 / kind.think_seconds) if kind.think_seconds else 0.0
            self._after(pause, lambda: self._ask(person))
            self._begin(server)

        self._after(1.0, end)

    def _settle(self) -> None:
        """All servers compute their credits again, from what was acknowledged so far and presented to them."""
        claims = {(client, server): work for (server, client), work in self._given.items()}
        for person in self.persons:
            own = person.identities
            claims |= {(one, other): INVENTED for one in own for other in own if one != other}
        for server in self.servers:
            owner = server.person.identities[0]
            taken = {giver: work for (giver, client), work in self._given.items() if client == owner}
            server.credits = credits_of(taken, claims)
        self._after(SETTLE_SECONDS, self._settle)
