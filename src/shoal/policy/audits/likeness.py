"""Whether two servers have computed the same, told from how far apart their outputs are.

Honest servers differ: in the order of their sums, in dtype, and by what quantization rounds away. The distance of two
outputs of a token is relative to how far the blocks moved the token's hidden state
(`shoal.client.swarm.comparing.distances`). What is allowed depends on how both servers compute. The figures are about
twice what `python -m benchmarks.audits` finds between honest servers; docs/trust.md has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from shoal.peers import ServerInfo

MIN_TOKENS = 8
"""The fewest tokens that are compared: the typical distance of fewer says little."""
FIRST_POSITION = 4
"""The tokens before it are not compared: blocks move the first tokens of a text by hundreds of times as much."""


@dataclass(frozen=True)
class Form:
    """How a server computes, as it announces it: its dtype and quantization, both by name."""

    dtype: str
    quantization: str


def form_of(server: ServerInfo) -> Form:
    """How a server says that it computes."""
    return Form(server.dtype, server.quantization)


@dataclass(frozen=True)
class Allowed:
    """How far apart honest outputs are at most: the median over the compared tokens, and every single one."""

    typical: float
    largest: float

    def either(self, other: Allowed) -> Allowed:
        """What allows everything that one of both allows."""
        return Allowed(max(self.typical, other.typical), max(self.largest, other.largest))


EXACT = Allowed(0.0002, 0.001)
"""Both servers compute in float32 with the same weights. CPUs differ by 0.000004 at most; GPUs were not measured."""
ROUNDED = Allowed(0.06, 0.18)
"""The weights are the same, and one server computes in bfloat16 or float16. It may keep its cache in int8, which it
does not announce: SmolLM2 has 0.029 and 0.087 then, and 0.022 and 0.056 without."""
BOTH_NF4 = Allowed(0.14, 0.3)
"""Both have weights of four bits that were rounded in different dtypes, so that some weights became others."""
INT8_STATES = Allowed(0.16, 0.6)
"""The same weights, and hidden states that travel or are kept in int8."""
BOTH_INT8 = Allowed(0.24, 0.7)
"""Both round inputs to int8, in which one bit more or less at the start of a span grows; most in different dtypes."""
ONE_INT8 = Allowed(0.33, 1.0)
"""One rounds weights and inputs to int8, and the other does not."""
ONE_NF4 = Allowed(0.9, 2.1)
"""One has weights of four bits, and the other does not."""
MOST_OF_GRADIENTS = 0.7
"""What is allowed of gradients at most, relative to them: from zeros it is 1, from gradients of another sign 2."""
BY_ENCODING = {"raw": EXACT, "bfloat16": ROUNDED, "int8": INT8_STATES}
"""What is allowed at least if hidden states are rounded on their way, or in the client's history."""


def allowed_between(one: Form, other: Form) -> Allowed:
    """How far apart the outputs of two honest servers are at most."""
    if one.quantization != other.quantization:
        return ONE_NF4 if "nf4" in (one.quantization, other.quantization) else ONE_INT8
    if one.quantization == "int8":
        return BOTH_INT8
    if one.quantization == "nf4":
        return ROUNDED if one.dtype == other.dtype else BOTH_NF4
    return EXACT if one.dtype == other.dtype == "float32" else ROUNDED


def allowed_among(one: Form, others: Iterable[Form], *, encoding: str = "raw") -> Allowed:
    """The same for outputs to which several servers have contributed: the widest of what is allowed.

    `encoding` is the smallest in which the hidden states were sent or kept.
    """
    found = BY_ENCODING[encoding]
    for other in others:
        found = found.either(allowed_between(one, other))
    return found


def typical(distances: Sequence[float]) -> float:
    """The distance that stands for all of them; infinite if one of them is no number."""
    return float("inf") if any(each != each for each in distances) else median(distances)


def are_alike(distances: Sequence[float], allowed: Allowed) -> bool:
    """Whether outputs at these distances, of at least one token, are those of honest servers."""
    return typical(distances) <= allowed.typical and max(distances) <= allowed.largest


def for_gradients(allowed: Allowed) -> Allowed:
    """How far apart gradients of honest servers are at most: one relative distance for each tensor as a whole.

    Seen with the bundled model, of inputs and of LoRA's factors, in spans of 1 to 12 blocks on one server or two: up to
    0.02 if one computes in bfloat16, 0.06 if one or both have int8, 0.23 if one has NF4. Between servers in float32,
    they were 0.03 if tensors traveled in int8, and 0 else. A random model of 4 blocks with large weights has up to 0.8,
    2 and 3.4, more than is allowed, because it amplifies every error: with such weights, servers have to compute alike.
    """
    most = min(allowed.largest, MOST_OF_GRADIENTS)
    return Allowed(most, most)
