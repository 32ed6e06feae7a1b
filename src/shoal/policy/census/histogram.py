"""How many servers hold which spans, and how fast they are: what placement knows of a swarm that it cannot read whole.

A *tally* counts the servers of one shard, by span. Some servers of each shard publish its tally. A reader takes the
middle of several, drops the tallies that contradict what it reads in the shards itself, and adds up the shards. Shards
are random parts of a bucket, so they are alike: one that has far more servers than the others is taken for a lie.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from shoal.peers import ServerInfo
from shoal.policy.machines.machine import Machine, machine_of, machines_of
from shoal.spans import Span

MAX_CELLS = 64
"""The spans of a tally that is published. It keeps its record small."""
OUTLIER = 3.0
"""A shard may have this many times as many servers as the shards of its bucket have in the middle."""
TOLERANCE, ALLOWED = 0.5, 8
"""A tally may differ from what a reader saw in this part of the servers, and this number: servers come and go."""


@dataclass(frozen=True)
class Cell:
    """Servers with the same span: how many there are, how many of them may move, and what they are like on average.

    `block_speed` and `single_speed` are the saturated speeds with this span and with one block, in tokens per second of
    one block. `network_speed` is in tokens per second, 0 if it is unknown. `load_seconds` are those of one block.
    """

    span: Span
    count: int
    movable: int
    max_blocks: int
    block_speed: float
    single_speed: float
    network_speed: float
    load_seconds: float

    def machines(self) -> tuple[Machine, ...]:
        """The servers of this cell as placement sees them: those that may move, and those that stay."""
        single, length = (1, max(self.single_speed, 1e-3)), len(self.span)
        speeds = (single, (length, max(self.block_speed, 1e-3))) if length > 1 else (single,)
        machine = Machine(
            f"servers of {self.span}",
            self.span,
            max(self.max_blocks, length),
            speeds,
            network_speed=self.network_speed or float("inf"),
            load_seconds=self.load_seconds,
            disk_seconds=self.load_seconds,
            count=self.movable,
        )
        fixed = replace(machine, peer=f"pinned servers of {self.span}", movable=False, count=self.count - self.movable)
        return tuple(each for each in (machine, fixed) if each.count > 0)


Tally = tuple[Cell, ...]
"""The servers of one shard, by span."""


@dataclass(frozen=True)
class Histogram:
    """The servers of a model. `machines` are what placement reads; each counts for its `count`.

    It is `exact` if all servers were read one by one; otherwise the machines are averages of all servers of a span.
    """

    machines: tuple[Machine, ...]
    exact: bool

    @property
    def num_servers(self) -> int:
        """How many servers there are."""
        return sum(machine.count for machine in self.machines)

    def holders(self, num_blocks: int) -> list[int]:
        """How many servers hold or load each block."""
        found = [0] * num_blocks
        for machine in self.machines:
            for block in machine.span or ():
                found[block] += machine.count
        return found


def histogram_of(servers: Iterable[ServerInfo], *, now: float) -> Histogram:
    """That of a swarm whose servers are all known. `now` is the Unix time."""
    return Histogram(tuple(machine for server in servers for machine in machines_of(server, now=now)), exact=True)


def tally_of(servers: Iterable[ServerInfo], *, now: float) -> Tally:
    """The tally of a shard with these servers, without those that leave or cannot be reached."""
    spans: dict[Span, list[Machine]] = defaultdict(list)
    for server in servers:
        machine = machine_of(server, now=now)
        if machine is not None:
            spans[server.span].append(machine)
    return tuple(_cell(span, spans[span]) for span in sorted(spans))


def _cell(span: Span, machines: Sequence[Machine]) -> Cell:
    networks = [machine.network_speed for machine in machines if machine.network_speed != float("inf")]
    return Cell(
        span,
        count=len(machines),
        movable=sum(machine.movable for machine in machines),
        max_blocks=round(_mean(float(machine.max_blocks) for machine in machines)),
        block_speed=_mean(machine.block_speed(len(span)) for machine in machines),
        single_speed=_mean(machine.block_speed(1) for machine in machines),
        network_speed=_mean(networks),
        load_seconds=_mean(machine.load_seconds for machine in machines),
    )


def shortened(tally: Tally, most: int) -> Tally:
    """The same servers in at most `most` cells: the rarest spans count as the span that is most like them."""
    cells = {cell.span: cell for cell in tally}
    while len(cells) > max(most, 1):
        rare = cells.pop(min(cells, key=lambda span: (cells[span].count, span)))
        near = min(cells, key=lambda span: (abs(span.start - rare.span.start) + abs(span.end - rare.span.end), span))
        both = cells[near]
        cells[near] = replace(both, count=both.count + rare.count, movable=both.movable + rare.movable)
    return tuple(cells[span] for span in sorted(cells))


def _mean(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) / len(found) if found else 0.0


def middle(tallies: Sequence[Tally]) -> Tally:
    """What most of several tallies of one shard agree on: the median of every number, span by span."""
    spans: dict[Span, list[Cell]] = defaultdict(list)
    for tally in tallies:
        for cell in tally:
            spans[cell.span].append(cell)
    found = []
    for span in sorted(spans):
        cells = spans[span]
        absent = [0] * (len(tallies) - len(cells))
        count = statistics.median_low([cell.count for cell in cells] + absent)
        movable = min(count, statistics.median_low([cell.movable for cell in cells] + absent))
        if count:
            found.append(
                Cell(
                    span,
                    count,
                    movable,
                    max_blocks=statistics.median_low(cell.max_blocks for cell in cells),
                    block_speed=statistics.median_low(cell.block_speed for cell in cells),
                    single_speed=statistics.median_low(cell.single_speed for cell in cells),
                    network_speed=statistics.median_low(cell.network_speed for cell in cells),
                    load_seconds=statistics.median_low(cell.load_seconds for cell in cells),
                )
            )
    return tuple(found)


def agrees(tally: Tally, seen: Tally) -> bool:
    """Whether a tally of a shard may be true, given what the reader has `seen` in it."""
    claimed, found = ({cell.span: cell for cell in each} for each in (tally, seen))
    number = sum(cell.count for cell in seen)
    differing = sum(
        abs((claimed[span].count if span in claimed else 0) - (found[span].count if span in found else 0))
        for span in claimed.keys() | found.keys()
    )
    if differing > ALLOWED + TOLERANCE * number:
        return False
    # A block without holders would move servers, so the holders of each block must agree too.
    for block in {block for span in (*claimed, *found) for block in span}:
        one, other = (sum(cell.count for cell in each if block in cell.span) for each in (tally, seen))
        if abs(one - other) > ALLOWED / 2 + TOLERANCE * other:
            return False
    speed, real = (sum(cell.count * cell.block_speed for cell in each) for each in (tally, seen))
    return number <= ALLOWED or speed <= 2 * real


def assemble(shards: Mapping[int, Mapping[int, Tally]], *, num_shards: Mapping[int, float]) -> Histogram:
    """The histogram of a model, from the tallies of shards: by bucket, and in it by the index of the shard.

    `num_shards` is the number of shards of each bucket. Shards that are not known count like the others of the bucket.
    """
    cells: list[Cell] = []
    for bucket, tallies in sorted(shards.items()):
        kept = _alike(list(tallies.values()))
        if kept:
            cells += _sum(kept, num_shards[bucket] / len(kept))
    return Histogram(tuple(machine for cell in cells for machine in cell.machines()), exact=False)


def _alike(tallies: Sequence[Tally]) -> list[Tally]:
    """Those without the ones that claim far more servers than the others."""
    sizes = [sum(cell.count for cell in tally) for tally in tallies]
    most = OUTLIER * (statistics.median(sizes) + 1) if sizes else 0
    return [tally for tally, size in zip(tallies, sizes, strict=True) if size <= most]


def _sum(tallies: Sequence[Tally], scale: float) -> list[Cell]:
    """All servers of a bucket by span. `scale` is how many times more shards there are than tallies."""
    spans: dict[Span, list[Cell]] = defaultdict(list)
    for tally in tallies:
        for cell in tally:
            spans[cell.span].append(cell)
    found = []
    for span, cells in sorted(spans.items()):
        count = sum(cell.count for cell in cells)

        def mean(of: str, cells: Sequence[Cell] = cells, count: int = count) -> float:
            return sum(float(getattr(cell, of)) * cell.count for cell in cells) / count

        found.append(
            Cell(
                span,
                count=max(1, round(count * scale)),
                movable=min(round(sum(cell.movable for cell in cells) * scale), max(1, round(count * scale))),
                max_blocks=round(mean("max_blocks")),
                block_speed=mean("block_speed"),
                single_speed=mean("single_speed"),
                network_speed=mean("network_speed"),
                load_seconds=mean("load_seconds"),
            )
        )
    return found
