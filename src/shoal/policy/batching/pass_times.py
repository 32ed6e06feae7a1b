"""How long passes take, learnt from those that were computed, and how many prefill tokens a pass has time for.

A pass costs what reading the weights costs, what attention reads for the sessions that decode, and what its prefills
cost. A prefill token costs its products, and attention to the tokens before it:

    seconds  =  pass + read × (tokens in the caches of those that decode)
              + Σ over prefill tokens (token + pair × (tokens that it sees))

So the parts of a long prompt get smaller towards its end, before a pass has taken too long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import sqrt

MIN_PREFILL_TOKENS = 16
"""Prefill tokens that every pass may take, so that prefills go on beside decoding. Fewer are too few to be timed."""
SMOOTHING = 0.2
"""The weight of a new measurement in a moving average."""
SURPRISE = 2.0
"""A pass that took more than this many times what was expected counts as if it had taken just that: another program may
have had the processor."""
LEAST_SECONDS = 1e-9
"""The least that a cost can come down to: a nanosecond."""
EVEN_CONTEXT = 4096.0
"""Tokens of context at which a surprise changes both terms of a cost alike. At a shorter context, it changes mostly
what is paid in any case, and at a longer one mostly the price of the context."""
EVEN_TOKENS = 8.0
"""The same for the decoding tokens of a pass: with about this many, they cost as much as the weights."""


@dataclass(frozen=True)
class Cost:
    """Seconds that grow with a context: `fixed`, and `each` for every token of the context."""

    fixed: float
    each: float = 0.0

    def at(self, context: float) -> float:
        """The seconds with this many tokens of context."""
        return self.fixed + self.each * context

    def learnt(self, context: float, seconds: float, *, even: float = EVEN_CONTEXT) -> Cost:
        """The cost after it was seen to be `seconds` at this context. At `even`, both terms change alike.

        This is the normalized least-mean-squares rule: it moves the cost at this context by the part `SMOOTHING` of the
        surprise. Costs at far shorter and far longer contexts hardly change.
        """
        surprise = _tempered(seconds, self.at(context)) - self.at(context)
        share = 1 / (1 + (context / even) ** 2)
        fixed = self.fixed + SMOOTHING * surprise * share
        each = self.each + SMOOTHING * surprise * (1 - share) / max(context, 1.0)
        return Cost(max(fixed, self.fixed / 2, LEAST_SECONDS), max(each, 0.0))


@dataclass(frozen=True)
class PassLoad:
    """What a pass computes.

    `num_read` tokens are in the caches of the sessions that decode in it, with `num_decoded` new tokens; attention
    reads all of them. It has `num_prefill` tokens of prefills, and `num_pairs` pairs of one of these and a token that
    it sees.
    """

    num_decoding: int = 0
    num_read: int = 0
    num_prefill: int = 0
    num_pairs: float = 0.0
    num_decoded: int = 0

    @classmethod
    def of(cls, *, num_rows: int, num_tokens: int, num_past: int, decodes: bool) -> PassLoad:
        """The work for `num_tokens` more tokens of each of `num_rows` sequences, behind `num_past` that are cached."""
        if decodes:
            num_read = num_rows * (num_past + num_tokens)
            return cls(num_decoding=num_rows, num_read=num_read, num_decoded=num_rows * num_tokens)
        return cls(num_prefill=num_rows * num_tokens, num_pairs=num_rows * num_tokens * _seen(num_past, num_tokens))

    @classmethod
    def total(cls, parts: Iterable[PassLoad]) -> PassLoad:
        """The work of all parts of a pass."""
        parts = list(parts)
        return cls(
            sum(each.num_decoding for each in parts),
            sum(each.num_read for each in parts),
            sum(each.num_prefill for each in parts),
            sum(each.num_pairs for each in parts),
            sum(each.num_decoded for each in parts),
        )


@dataclass(frozen=True)
class PrefillBudget:
    """What the prefills of a pass may take: `seconds`, if a token costs `token`, and so much more for all that it sees.

    The first prefill of a pass may have `MIN_PREFILL_TOKENS` tokens, whatever they take.
    """

    seconds: float
    token: Cost
    is_untouched: bool = True

    def num_tokens(self, *, num_rows: int, num_past: int) -> int:
        """How many more tokens of each of `num_rows` sequences there is time for, behind `num_past` cached ones."""
        # token.fixed · t + token.each · t · (num_past + (t + 1) / 2) = seconds / num_rows, solved for t
        seconds = max(0.0, self.seconds) / num_rows
        linear = self.token.at(num_past + 0.5)
        found = int(2 * seconds / (linear + sqrt(linear * linear + 2 * self.token.each * seconds)) * (1 + 1e-9))
        return max(found, MIN_PREFILL_TOKENS // num_rows) if self.is_untouched else found

    def without(self, *, num_rows: int, num_tokens: int, num_past: int) -> PrefillBudget:
        """What is left of it when these tokens are computed."""
        seconds = num_rows * num_tokens * self.token.at(_seen(num_past, num_tokens))
        return replace(self, seconds=self.seconds - seconds, is_untouched=False)


@dataclass(frozen=True)
class PassTimeModel:
    """How long passes take on this machine.

    A pass that decodes takes `decode_seconds` as a rule. Two costs are by context: of the decoding part of a pass, by
    the tokens that it reads, and of a prefill token, by the tokens that it sees. `by_tokens` is the cost of a pass that
    decodes by its new tokens, beside what it reads; `None` if nothing is known of it.
    """

    decode_seconds: float
    decoding: Cost
    prefill_token: Cost
    by_tokens: Cost | None = None

    @classmethod
    def measured(cls, *, decode_seconds: float, prefill_token_seconds: float) -> PassTimeModel:
        """What is believed after measurements with short contexts."""
        return cls(decode_seconds, Cost(decode_seconds), Cost(prefill_token_seconds))

    def seconds_of(self, work: PassLoad) -> float:
        """How long a pass will take."""
        return self.seconds_of_decoding(work) + self.seconds_of_prefill(work)

    def seconds_of_decoding(self, work: PassLoad) -> float:
        """What the decoding part of a pass will take, with the reading of the weights."""
        if self.by_tokens is None or not work.num_decoded:
            return self.decoding.at(work.num_read)
        return self.by_tokens.at(work.num_decoded) + self.decoding.each * work.num_read

    def seconds_of_prefill(self, work: PassLoad) -> float:
        """What the prefills of a pass will add to it."""
        return work.num_prefill * self.prefill_token.at(work.num_pairs / work.num_prefill) if work.num_prefill else 0.0

    @property
    def decoded_tokens(self) -> Cost:
        """The cost of a pass that decodes, by its new tokens. If none was seen, they cost what those of prompts do."""
        if self.by_tokens is not None:
            return self.by_tokens
        token = self.prefill_token.fixed
        return Cost(max(self.decoding.fixed - token, token), token)

    def added_by(self, work: PassLoad) -> float:
        """How many seconds this part of a pass adds to what reading the weights takes."""
        decoding = self.decoded_tokens.each * work.num_decoded + self.decoding.each * work.num_read
        return decoding + self.seconds_of_prefill(work)

    def beside(self, decoding: PassLoad, *, share: float) -> PrefillBudget:
        """What prefills may take in a pass with this `decoding` work: `share` of the time.

        Without such work the pass keeps sessions waiting that will decode, and counts as a usual pass.
        """
        seconds = self.seconds_of_decoding(decoding) if decoding.num_decoding else self.decode_seconds
        return PrefillBudget(seconds * share / (1 - share), self.prefill_token)

    def alone(self, *, max_num_batched_tokens: int) -> PrefillBudget:
        """What prefills may take while no session decodes: as long as the largest pass takes without a context.

        A session that comes meanwhile waits for it.
        """
        return PrefillBudget(
            max_num_batched_tokens * self.prefill_token.at((max_num_batched_tokens + 1) / 2), self.prefill_token
        )

    def learnt(self, work: PassLoad, seconds: float) -> PassTimeModel:
        """The model after one more pass, which took `seconds`.

        What surprises in a pass that decodes and prefills is put down to its prefills, unless the tokens that decode
        take longer: many may never have been in a pass without prefills.
        """
        if not work.num_prefill:
            usual = self.decode_seconds + SMOOTHING * (_tempered(seconds, self.decode_seconds) - self.decode_seconds)
            decoding = self.decoding.learnt(work.num_read, seconds)
            return replace(self._with_decoding(work, seconds), decode_seconds=usual, decoding=decoding)
        prefill, decoding_seconds = self.seconds_of_prefill(work), self.seconds_of_decoding(work)
        if self.decoded_tokens.each * work.num_decoded > prefill:
            return self._with_decoding(work, seconds - prefill)
        if work.num_prefill < MIN_PREFILL_TOKENS:
            return self
        context = work.num_pairs / work.num_prefill
        token = self.prefill_token.learnt(context, (seconds - decoding_seconds) / work.num_prefill)
        return replace(self, prefill_token=token)

    def _with_decoding(self, work: PassLoad, seconds: float) -> PassTimeModel:
        """With what the decoding part of a pass took, by its tokens."""
        own = max(0.0, seconds - self.decoding.each * work.num_read)
        return replace(self, by_tokens=self.decoded_tokens.learnt(work.num_decoded, own, even=EVEN_TOKENS))


def _seen(num_past: int, num_tokens: int) -> float:
    """How many tokens each of `num_tokens` new ones sees on average, itself included."""
    return num_past + (num_tokens + 1) / 2


def _tempered(seconds: float, expected: float) -> float:
    return min(max(seconds, 0.0), expected * SURPRISE)
