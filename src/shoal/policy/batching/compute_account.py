"""Who has had which part of a server's compute, and who decodes: what an engine's loop keeps between its passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from shoal.policy.batching.fair_queueing import FairQueue
from shoal.policy.batching.pass_shares import AGED_SECONDS, Debts, PassShares, Sharing, charges
from shoal.policy.batching.pass_times import PassLoad, PassTimeModel

RETURN_SECONDS = 0.5
"""A payer that sends more within this time keeps its place among those that take turns: about a round trip."""


@dataclass(frozen=True)
class ComputeAccount:
    """The seconds that payers have `used` and owe others (`debts`).

    Of each, it has too when a decoding step of it was computed last, when a single pass (`trained_at`), and when a
    prompt, with the seconds of its last part (`prompted`); and how long the pieces of its single passes take. `weights`
    are those of payers that have others than 1.
    """

    used: FairQueue = field(default_factory=FairQueue)
    debts: Debts = field(default_factory=Debts)
    decoded_at: Mapping[str, float] = field(default_factory=dict)
    trained_at: Mapping[str, float] = field(default_factory=dict)
    prompted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    piece_seconds: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    def weighing(self, weight_of: Callable[[str], float], payers: Collection[str]) -> ComputeAccount:
        """With the weights that these payers have now."""
        weights = {payer: weight for payer in payers if (weight := weight_of(payer)) != 1.0}
        return self if weights == self.weights else replace(self, weights=weights)

    def sharing(
        self,
        pass_time: PassTimeModel,
        *,
        away: frozenset[str],
        next_in: float | None,
        waiting: Collection[str],
        now: float,
    ) -> Sharing:
        """What the division of the next pass follows from. Those `waiting` have steps that wait, those `away` have none
        just now; the next step of these is expected in `next_in` seconds."""
        return Sharing(
            pass_time,
            away,
            next_in,
            self.debts,
            self.used,
            self.prompted_at,
            self.prompt_seconds(waiting=waiting, now=now),
            self.weights,
        )

    def decoding(self, *, now: float, recently: float) -> frozenset[str]:
        """The payers whose steps were computed `recently`, in seconds: they count as decoding between them too."""
        return frozenset(payer for payer, at in self.decoded_at.items() if now - at < recently)

    def after_pass(
        self,
        parts: Sequence[tuple[str, PassLoad]],
        seconds: float,
        *,
        shares: PassShares,
        pass_time: PassTimeModel,
        present: Collection[str],
        queued: Collection[str],
        now: float,
        recently: float,
    ) -> ComputeAccount:
        """After a pass that took `seconds`, with `parts` of payers. The `queued` ones have work that takes turns."""
        charged = charges(parts, pass_time, seconds)
        debts = self.debts.after(
            seconds, present=present, took_part=charged.keys(), excess=shares.excess(charged, seconds)
        )
        decoded_at = {payer: at for payer, at in self.decoded_at.items() if now - at < recently}
        decoded_at |= {payer: now for payer, work in parts if work.num_decoding}
        prompted = {payer: last for payer, last in self.prompted.items() if now - last[0] < AGED_SECONDS}
        prompted |= {payer: (now, charged[payer]) for payer, work in parts if work.num_prefill}
        after = replace(self, debts=debts, decoded_at=decoded_at, prompted=prompted)
        waiting = after._returning(now) | set(queued)
        return replace(after, used=self.used.charged(charged, waiting=waiting, weights=self.weights))

    @property
    def prompted_at(self) -> Mapping[str, float]:
        """When a prompt of each payer was last computed."""
        return {payer: at for payer, (at, _) in self.prompted.items()}

    def prompt_seconds(self, *, waiting: Collection[str], now: float) -> float:
        """The shortest last part of a prompt, of payers that had one a moment ago and have nothing `waiting`."""
        parts = (
            seconds
            for payer, (at, seconds) in self.prompted.items()
            if payer not in waiting and now - at < RETURN_SECONDS
        )
        return min(parts, default=inf)

    def after_piece(
        self,
        payer: str,
        seconds: float,
        *,
        delayed_others: bool,
        present: Collection[str],
        queued: Collection[str],
        now: float,
    ) -> ComputeAccount:
        """After a piece of a single pass. If it `delayed_others`, its payer owes them as much time.

        The longest piece counts, and counts half with each that follows.
        """
        longest = max(seconds, self.piece_seconds.get(payer, 0.0) / 2)
        trained_at = {each: at for each, at in self.trained_at.items() if now - at < RETURN_SECONDS} | {payer: now}
        kept = trained_at.keys() | set(queued)
        pieces = {each: its for each, its in self.piece_seconds.items() if each in kept} | {payer: longest}
        used = self.used.charged({payer: seconds}, waiting=self._returning(now) | kept, weights=self.weights)
        after = self.after_aside(payer, seconds if delayed_others else 0.0, elapsed=seconds, present=present)
        return replace(after, used=used, trained_at=trained_at, piece_seconds=pieces)

    def _returning(self, now: float) -> set[str]:
        """The payers that had a turn a moment ago: they keep their place among those that take turns."""
        prompted = {payer for payer, (at, _) in self.prompted.items() if now - at < RETURN_SECONDS}
        return prompted | {payer for payer, at in self.trained_at.items() if now - at < RETURN_SECONDS}

    def after_aside(self, payer: str, owed: float, *, elapsed: float = 0.0, present: Collection[str]) -> ComputeAccount:
        """After work for one payer that kept others waiting for `owed` seconds, of `elapsed` on the compute thread."""
        present = {payer, *present}
        return replace(self, debts=self.debts.after(elapsed, present=present, took_part=[payer], excess={payer: owed}))

    def after_waiting(self, seconds: float, *, present: Collection[str]) -> ComputeAccount:
        """After nothing was computed for so long, because those present that owe nothing were expected."""
        return replace(self, debts=self.debts.after(seconds, present=present)) if self.debts.seconds else self


def client_weights(ready: Iterable[str], expected: Sequence[str]) -> tuple[float, list[float]]:
    """How much the steps count that are ready, and each that is expected, when some should wait for others.

    They are named by their payers. All steps of a payer count as much together as those of the payer with the fewest.
    """
    ready = list(ready)
    counts: dict[str, int] = {}
    for payer in (*ready, *expected):
        counts[payer] = counts.get(payer, 0) + 1
    least = min(counts.values(), default=1)
    weight = {payer: least / count for payer, count in counts.items()}
    return sum(weight[payer] for payer in ready), [weight[payer] for payer in expected]
