"""What a swarm that changes was worth over time: shares of the placement-free bound, holes, moves.

The share "exact" is what servers reach that divide their time among their blocks as well as possible, "min" the summed
speed of the weakest block (the paper's measure); both are shares of what the machines that are there could reach if
blocks were anywhere (`shoal.policy.machines.bound`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.spans import Span


@dataclass(frozen=True)
class Summary:
    """A run in figures. Shares are averages over time, between 0 and 1.

    `hole` is the share of time in which a block had no server that was online. Times in which all machines together
    cannot hold all blocks are left out of these, and make the share `impossible`. In the part `left_over` of `hole`,
    the blocks without a server had none since such a time: the machines that brought it to its end load them.
    `heal_seconds` is the median time for which a block had no server, `None` if there was no hole. `copies` is how many
    times the machines can hold each block, and `num_machines` how many there were, on average.
    """

    exact: float
    minimum: float
    hole: float
    left_over: float
    impossible: float
    heal_seconds: float | None
    num_holes: int
    num_moves: int
    num_departures: int
    copies: float
    num_machines: float
    tokens_per_second: float

    @property
    def moves_per_departure(self) -> float:
        """How many moves there were for each server that left."""
        return self.num_moves / max(1, self.num_departures)


def mean_of(summaries: Sequence[Summary]) -> Summary:
    """The averages over several runs of the same length; of `heal_seconds`, the median over the runs that had holes."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    healed = [each.heal_seconds for each in summaries if each.heal_seconds is not None]
    return Summary(
        exact=mean([each.exact for each in summaries]),
        minimum=mean([each.minimum for each in summaries]),
        hole=mean([each.hole for each in summaries]),
        left_over=mean([each.left_over for each in summaries]),
        impossible=mean([each.impossible for each in summaries]),
        heal_seconds=statistics.median(healed) if healed else None,
        num_holes=sum(each.num_holes for each in summaries),
        num_moves=sum(each.num_moves for each in summaries),
        num_departures=sum(each.num_departures for each in summaries),
        copies=mean([each.copies for each in summaries]),
        num_machines=mean([each.num_machines for each in summaries]),
        tokens_per_second=mean([each.tokens_per_second for each in summaries]),
    )


@dataclass(frozen=True)
class Worth:
    """What a swarm can do at one moment, in tokens per second, and what its machines could do."""

    exact: float
    minimum: float
    bound: float
    num_machines: int
    copies: float


SUMMED = ("exact", "minimum", "hole", "left_over", "speed", "possible", "impossible", "machines", "copies")
"""What is multiplied by the seconds for which it was so, and added up."""
NOTHING = Worth(0.0, 0.0, 0.0, 0, 0.0)


@dataclass
class Meter:
    """Averages over time from the time `begins` on. What happens before counts for the state only."""

    num_blocks: int
    begins: float
    _since: float = 0.0
    _worth: Worth = NOTHING
    _has_hole: bool = True
    _last_impossible: float = float("-inf")
    _sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMMED, 0.0))
    _holders: list[int] = field(default_factory=list)
    _empty_since: dict[int, float] = field(default_factory=dict)
    _healed: list[float] = field(default_factory=list)
    num_moves: int = 0
    num_departures: int = 0
    history: list[tuple[float, float, bool]] = field(default_factory=list)
    """The time, the exact share and whether there is a hole, at each change: for plots."""

    def __post_init__(self) -> None:
        self._holders = [0] * self.num_blocks
        self._since = self.begins

    @property
    def has_hole(self) -> bool:
        """Whether a block has no server that is online."""
        return any(not count for count in self._holders)

    @property
    def _is_left_over(self) -> bool:
        """Whether all blocks without a server had none already when the machines could not hold all blocks."""
        empty = (block for block, count in enumerate(self._holders) if not count)
        return all(self._empty_since.get(block, float("-inf")) < self._last_impossible for block in empty)

    def fewest_holders(self, span: Span) -> int:
        """How many servers that are online hold the block of the span that the fewest hold."""
        return min(self._holders[span.start : span.end])

    def online(self, span: Span, *, now: float) -> None:
        """A server with this span is online from now on."""
        self._pass(now)
        for block in span:
            self._holders[block] += 1
            since = self._empty_since.pop(block, None)
            if since is not None and since >= max(self.begins, self._last_impossible):
                self._healed.append(now - since)
        self._has_hole = self.has_hole

    def offline(self, span: Span, *, now: float) -> None:
        """A server with this span is not online any more."""
        self._pass(now)
        for block in span:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._empty_since[block] = now
        self._has_hole = self.has_hole

    def moved(self, *, now: float) -> None:
        """A server has begun to move."""
        self.num_moves += now >= self.begins

    def departed(self, *, now: float) -> None:
        """A server has gone."""
        self.num_departures += now >= self.begins

    def worth(self, worth: Worth, *, now: float) -> None:
        """What the swarm can do from now on."""
        self._pass(now)
        self._worth = worth
        share = worth.exact / worth.bound if worth.bound > 0 else 0.0
        self.history.append((now, share, self._has_hole))

    def _pass(self, now: float) -> None:
        """Count the time since the last change."""
        seconds = now - self._since
        if seconds <= 0:
            return
        self._since = now
        worth = self._worth
        self._sums["machines"] += worth.num_machines * seconds
        self._sums["copies"] += worth.copies * seconds
        if worth.bound <= 0:
            self._sums["impossible"] += seconds
            self._last_impossible = now
            return
        self._sums["possible"] += seconds
        self._sums["speed"] += worth.exact * seconds
        self._sums["exact"] += worth.exact / worth.bound * seconds
        self._sums["minimum"] += worth.minimum / worth.bound * seconds
        self._sums["hole"] += self._has_hole * seconds
        self._sums["left_over"] += (self._has_hole and self._is_left_over) * seconds

    def summary(self, *, now: float) -> Summary:
        """The figures up to now."""
        self._pass(now)
        possible = max(self._sums["possible"], 1e-9)
        total = max(self._sums["possible"] + self._sums["impossible"], 1e-9)
        return Summary(
            exact=self._sums["exact"] / possible,
            minimum=self._sums["minimum"] / possible,
            hole=self._sums["hole"] / possible,
            left_over=self._sums["left_over"] / possible,
            impossible=self._sums["impossible"] / total,
            heal_seconds=statistics.median(self._healed) if self._healed else None,
            num_holes=len(self._healed) + sum(since >= self.begins for since in self._empty_since.values()),
            num_moves=self.num_moves,
            num_departures=self.num_departures,
            copies=self._sums["copies"] / total,
            num_machines=self._sums["machines"] / total,
            tokens_per_second=self._sums["speed"] / possible,
        )
