"""The last logits that a server's output head gave in a session, as far as an audit compares them."""

# B sequences, N tokens, V vocabulary, K likeliest tokens

from __future__ import annotations

from collections import deque

from shoal.client.head.logits import Logits, LogitsRequest

_LEAST = 1e-12

TAIL_TOKENS = 16
"""The tokens whose logits are kept. Those of a large vocabulary take as much as the hidden states of 50 tokens."""


class LogitsTail:
    """The logits of one sequence of a batch, the one in `row`, for its last tokens."""

    def __init__(self, *, row: int) -> None:
        self._row = row
        self._start = 0  # the position of the first token
        self._answers: deque[Logits] = deque(maxlen=TAIL_TOKENS)
        self._request: LogitsRequest | None = None

    @property
    def num_tokens(self) -> int:
        """The position after its last token."""
        return self._start + len(self._answers)

    @property
    def start(self) -> int:
        """The position of its first token."""
        return self._start

    def append(self, answer: Logits, request: LogitsRequest, end: int) -> None:
        """Add the answer to a step that ended at `end`: one token, as a rule. After a gap, the tail begins anew."""
        if request != self._request or self.num_tokens != end - 1 or answer.values.shape[1] != 1:
            self._answers.clear()
        last = self.of_row(Logits(answer.values[:, -1:], None if answer.ids is None else answer.ids[:, -1:]))
        self._answers.append(last)
        self._request, self._start = request, end - len(self._answers)

    def crop(self, num_tokens: int) -> None:
        """Forget the logits of all tokens after the first `num_tokens`."""
        while self._answers and self.num_tokens > num_tokens:
            self._answers.pop()

    def between(self, start: int, end: int) -> Logits:
        """The logits of at least one token, of its sequence alone."""
        return Logits.joined([self._answers[position - self._start] for position in range(start, end)])

    def request(self, num_tokens: int) -> LogitsRequest:
        """What to ask a witness, to be given the logits of as many last tokens."""
        assert self._request is not None
        return LogitsRequest(num_tokens, self._request.vocabulary, self._request.top_k)

    def of_row(self, answer: Logits) -> Logits:
        """An answer for its sequence alone."""
        row = slice(self._row, self._row + 1)
        return Logits(answer.values[row].clone(), None if answer.ids is None else answer.ids[row].clone())


def logits_distances(claimed: Logits, witnessed: Logits) -> list[float]:
    """For each token, how far the logits of a sequence are from what a witness computed; NaN if not finite.

    It is relative to how far those of the witness are from their mean. Of the likeliest tokens, those count that both
    have named, unless these are fewer than half: then the distance is infinite.
    """
    found: list[float] = []
    for index in range(claimed.values.shape[1]):
        one, other = claimed.values[0, index].double(), witnessed.values[0, index].double()
        if claimed.ids is not None and witnessed.ids is not None:
            both = claimed.ids[0, index][:, None] == witnessed.ids[0, index][None]
            if 2 * int(both.sum()) < len(one):
                found.append(float("inf"))
                continue
            mine, others = both.nonzero(as_tuple=True)
            one, other = one[mine], other[others]
        spread = (other - other.mean()).norm().clamp(min=_LEAST)
        found.append(float((one - other).norm() / spread))
    return found
