"""All machines of a swarm as arrays: what placements are computed with.

A machine's *capacity* is in tokens per second of one block: what its processor does with a span of a given length, and
what its network carries. The letters of shapes: M machines, N blocks, L lengths, Z zones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal.policy.machines.lifetime import BEFORE_ANY_WAS_SEEN, Lifetimes
from shoal.policy.machines.machine import Machine, kept_blocks, one_place_each
from shoal.spans import Span

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
Element = TypeVar("Element", bound=np.generic)

HORIZON = 600.0
"""Seconds that a decision looks ahead. A machine that loads for part of them counts for the rest. In a quiet swarm they
are `QUIET_SECONDS`: what is gained there lasts."""
MOST_MEDIANS = 32.0
"""No machine counts for more than this many machines of median capacity: announcing a high speed costs nothing."""
ASSUMED_LOSS = 0.15
"""The chance that a machine vanishes before the next one has loaded, while machines come and go."""
QUIET_SECONDS = 86400.0
"""A swarm is quiet if no machine came within this time. The chance that a machine vanishes then follows from its age,
and throughput counts for more. Where machines come and go, such chances led to more holes and to less throughput."""
DOUBTED_LOSS = 0.5
"""The same for a machine whose claim is not plausible."""
MAX_ZONES = 64
"""Zones that are told apart. Announcing a zone costs nothing either; those beyond count as unknown."""


def summed(places: Ints, amounts: Floats, size: int) -> Floats:
    """For each of `size` places, the sum of the amounts that belong there."""
    return np.bincount(places, amounts, size).astype(np.float64)


@dataclass(frozen=True)
class Kinds:
    """What machines could compute: `capacity` by kind and length of the span, and the `longest` span of each kind.

    `network` is the tokens per second that a machine carries, whatever its span: no single block gets more of it.
    """

    capacity: Floats  # [kinds, L + 1]; column 0 is 0
    longest: Ints  # [kinds]
    network: Floats  # [kinds]

    @property
    def best(self) -> Floats:
        """The highest capacity of each kind, at the length that allows it."""
        best: Floats = np.where(self.allowed, self.capacity, 0.0).max(axis=1)
        return best

    @property
    def allowed(self) -> Flags:
        """Whether a kind can hold a span of that length."""
        return np.arange(self.capacity.shape[1]) <= self.longest[:, None]


def tabulate(machines: Sequence[Machine], num_blocks: int) -> tuple[Kinds, Ints]:
    """The kinds of machines, and the kind of each machine."""
    found: dict[tuple[object, ...], int] = {}
    examples: list[tuple[Machine, int]] = []
    kinds = np.empty(len(machines), np.int64)
    for index, machine in enumerate(machines):
        held = 0 if machine.span is None else len(machine.span)
        longest = min(num_blocks, max(1, machine.max_blocks, held))
        key = (longest, machine.network_speed, machine.block_speeds)
        kind = found.get(key)
        if kind is None:
            kind = found[key] = len(examples)
            examples.append((machine, longest))
        kinds[index] = kind
    if not examples:
        return Kinds(np.zeros((1, 2)), np.ones(1, np.int64), np.zeros(1)), kinds
    longest_of = np.array([longest for _, longest in examples])
    lengths = np.arange(1, longest_of.max() + 1)
    speeds = _interpolated([machine.block_speeds for machine, _ in examples], lengths)
    network = np.array([machine.network_speed for machine, _ in examples])
    capacity = np.minimum(speeds, network[:, None] * lengths)
    return Kinds(np.concatenate((np.zeros((len(examples), 1)), capacity), axis=1), longest_of, network), kinds


def _interpolated(speeds: Sequence[tuple[tuple[int, float], ...]], lengths: Ints) -> Floats:
    """`Machine.block_speed` of many machines, for all lengths at once."""
    points = max(len(pairs) for pairs in speeds)
    padded = np.array([(*pairs, *[pairs[-1]] * (points - len(pairs))) for pairs in speeds], np.float64)
    known, values = padded[:, :, 0], padded[:, :, 1]
    result = np.broadcast_to(values[:, :1], (len(speeds), len(lengths))).copy()
    for point in range(points - 1):
        left, right = known[:, point, None], known[:, point + 1, None]
        slope = (values[:, point + 1, None] - values[:, point, None]) / np.maximum(right - left, 1.0)
        line = values[:, point, None] + slope * (np.minimum(lengths, right) - left)
        result = np.where(lengths > left, line, result)
    return result


@dataclass(frozen=True)
class KeptSpans:
    """The blocks that each machine serves now and goes on serving; 0 and 0 where there are none."""

    starts: Ints
    ends: Ints


@dataclass(frozen=True)
class Fleet:
    """Machines as arrays, in the order of their peer ids, so that equal views give equal numbers.

    `starts` and `ends` are 0 where a machine has no span; `kept` says which blocks of it are served now, and go on
    being served. `weights` say for which part of the `horizon` a machine serves its span.
    `doubted` machines make claims that are not plausible; `whole` ones claim every block besides. `losses` are the
    chances that a machine vanishes before another has loaded. Zone 0 is unknown. In a `quiet` swarm no machine came for
    a day.
    """

    machines: tuple[Machine, ...]
    num_blocks: int
    kinds: Kinds
    kind: Ints
    starts: Ints
    ends: Ints
    counts: Floats
    weights: Floats
    kept: KeptSpans
    movable: Flags
    doubted: Flags
    whole: Flags
    losses: Floats
    zones: Ints
    quiet: bool

    @classmethod
    def of(
        cls, machines: Iterable[Machine], num_blocks: int, *, now: float, lifetimes: Lifetimes | None = None
    ) -> Fleet:
        """The machines of a view. One that claims a span in addition to the one it holds counts where it goes."""
        listed = tuple(one_place_each(machines))
        kinds, kind = tabulate(listed, num_blocks)
        counts = np.array([float(machine.count) for machine in listed])
        starts = np.array([0 if m.span is None else min(m.span.start, num_blocks) for m in listed], np.int64)
        ends = np.array([0 if m.span is None else min(m.span.end, num_blocks) for m in listed], np.int64)
        ready = np.array([machine.ready_at for machine in listed])
        serves = [machine.serves for machine in listed]
        doubted, whole = _doubted(ends - starts, counts, num_blocks)
        losses = np.array(_losses(listed, now, lifetimes))
        quiet = is_quiet(listed, now)
        horizon = QUIET_SECONDS if quiet else HORIZON
        return cls(
            machines=listed,
            num_blocks=num_blocks,
            kinds=replace(kinds, capacity=np.minimum(kinds.capacity, _ceiling(kinds.best[kind], counts))),
            kind=kind,
            starts=starts,
            ends=ends,
            counts=counts,
            weights=np.clip((horizon - (ready - now)) / horizon, 0.0, 1.0),
            kept=KeptSpans(
                starts=np.array([0 if span is None else min(span.start, num_blocks) for span in serves], np.int64),
                ends=np.array([0 if span is None else min(span.end, num_blocks) for span in serves], np.int64),
            ),
            movable=np.array([machine.movable and machine.span is not None for machine in listed], np.bool_),
            doubted=doubted,
            whole=whole,
            losses=np.where(doubted, np.maximum(losses, DOUBTED_LOSS), losses),
            zones=_zone_numbers(listed),
            quiet=quiet,
        )

    @property
    def horizon(self) -> float:
        """Seconds that a decision looks ahead."""
        return QUIET_SECONDS if self.quiet else HORIZON

    @property
    def lengths(self) -> Ints:
        """The number of blocks of each entry's span."""
        return self.ends - self.starts

    @property
    def capacity(self) -> Floats:
        """The capacity of one machine of each entry, in its present span."""
        return self.kinds.capacity[self.kind, self.lengths]

    @property
    def alone(self) -> Floats:
        """What one machine of each entry does for a block of its span if it computes no other."""
        return np.minimum(self.capacity, self.kinds.network[self.kind])

    @property
    def num_zones(self) -> int:
        """How many zones there are, with the unknown one."""
        return int(self.zones.max(initial=0)) + 1

    def servers(self, selected: Flags) -> Floats:
        """How many of the selected machines serve each block now, and go on doing that."""
        return _per_block(self.kept.starts, self.kept.ends, np.where(selected, self.counts, 0.0), self.num_blocks)

    def per_block(self, amounts: Floats) -> Floats:
        """For each block, the sum of the amounts of the machines that hold it."""
        return _per_block(self.starts, self.ends, amounts, self.num_blocks)

    def moved(self, index: int, span: Span) -> Fleet:
        """The same machines after one of entry `index` has set out for `span`: it loads, and moves no more."""
        fleet, row = self, index
        before = Span(int(self.starts[index]), int(self.ends[index]))
        kept = kept_blocks(before, span, int(self.kinds.longest[self.kind[index]]))
        if self.counts[index] > 1:
            counts = self.counts.copy()
            counts[index] -= 1
            fleet, row = replace(self, counts=counts)._with_copy(index), len(self.machines)

        def put(values: NDArray[Element], value: Any) -> NDArray[Element]:
            values = values.copy()
            values[row] = value
            return values

        return replace(
            fleet,
            starts=put(fleet.starts, span.start),
            ends=put(fleet.ends, span.end),
            kept=KeptSpans(
                put(fleet.kept.starts, 0 if kept is None else kept.start),
                put(fleet.kept.ends, 0 if kept is None else kept.end),
            ),
            movable=put(fleet.movable, False),
            weights=put(fleet.weights, 1.0),
        )

    def _with_copy(self, index: int) -> Fleet:
        """The same entries, and at the end one machine like those of entry `index`."""

        def grown(values: NDArray[Element]) -> NDArray[Element]:
            return np.append(values, values[index : index + 1])

        return replace(
            self,
            machines=(*self.machines, self.machines[index]),
            kind=grown(self.kind),
            starts=grown(self.starts),
            ends=grown(self.ends),
            counts=np.append(self.counts, 1.0),
            weights=grown(self.weights),
            kept=KeptSpans(grown(self.kept.starts), grown(self.kept.ends)),
            movable=grown(self.movable),
            doubted=grown(self.doubted),
            whole=grown(self.whole),
            losses=grown(self.losses),
            zones=grown(self.zones),
        )


def _losses(machines: Sequence[Machine], now: float, lifetimes: Lifetimes | None) -> list[float]:
    """The chance that each machine vanishes before another has loaded."""
    if lifetimes is not None:
        return [lifetimes.loss(machine.zone, now - machine.up_since) for machine in machines]
    if not is_quiet(machines, now):
        return [ASSUMED_LOSS] * len(machines)
    return [BEFORE_ANY_WAS_SEEN.typical_loss(now - machine.up_since) for machine in machines]


def is_quiet(machines: Sequence[Machine], now: float) -> bool:
    """Whether no machine came within `QUIET_SECONDS`; not if the time is not known."""
    return now < math.inf and all(now - machine.up_since >= QUIET_SECONDS for machine in machines)


def _per_block(starts: Ints, ends: Ints, amounts: Floats, num_blocks: int) -> Floats:
    change = summed(starts, amounts, num_blocks + 1) - summed(ends, amounts, num_blocks + 1)
    return np.cumsum(change)[:-1]


def _weighted_median(values: NDArray[np.generic], counts: Floats) -> float:
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(counts[order])
    return float(values[order[np.searchsorted(reached, reached[-1] / 2)]])


def _ceiling(capacity: Floats, counts: Floats) -> float:
    return math.inf if len(capacity) == 0 else MOST_MEDIANS * _weighted_median(capacity, counts)


def _doubted(lengths: Ints, counts: Floats, num_blocks: int) -> tuple[Flags, Flags]:
    """Which machines claim more blocks than is plausible, so that no block is left to them alone; and which claim all.

    Claiming costs nothing. A claim is doubted if it is for more than half of the model and for more than twice what the
    median machine holds, or for all of the model where the median machine holds less.
    """
    held = lengths > 0
    if not held.any():
        return held, held
    median = _weighted_median(lengths[held], counts[held])
    whole = (lengths == num_blocks) & (median < num_blocks)
    return whole | ((2 * lengths > num_blocks) & (lengths > 2 * median)), whole


def _zone_numbers(machines: Sequence[Machine]) -> Ints:
    """A number for each zone, the most common first; 0 where the zone is unknown."""
    sizes: dict[str, int] = {}
    for machine in machines:
        if machine.zone:
            sizes[machine.zone] = sizes.get(machine.zone, 0) + machine.count
    common = sorted(sizes, key=lambda zone: (-sizes[zone], zone))[:MAX_ZONES]
    numbers = {zone: number for number, zone in enumerate(common, start=1)}
    return np.array([numbers.get(machine.zone, 0) for machine in machines], np.int64)
