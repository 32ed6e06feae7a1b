"""What a session asks of servers, and which it could be on: for all of its blocks, or in the place of one of them."""

from __future__ import annotations

from collections.abc import Callable, Set

from shoal.client.chain import Chain, Holding
from shoal.client.history import History
from shoal.client.lane import Lane
from shoal.client.outputs import Nowhere
from shoal.client.share import Share
from shoal.client.tokens import Tokens
from shoal.model.factors import Tuning
from shoal.routing.route import Needs, Route
from shoal.spans import ServerInfo, Span

OPEN_ENDED_STEPS = 128
"""So many more steps are expected of a session that has got as long as anybody has said that it would."""


class Routes:
    """Finds routes for what a session holds, and for what it is still going to hold."""

    def __init__(
        self, chain: Chain, tokens: Tokens, tuning: Tuning, *, batch_size: int, max_length: int, announced_length: int
    ) -> None:
        self.batch_size = batch_size
        self.announced_length = announced_length
        self._max_length = max_length
        self._chain = chain
        self._tokens = tokens
        self._tuning = tuning

    @property
    def expected_length(self) -> int:
        """How many tokens a server has to have room for: as many as the caller has said, and at least those of now."""
        return max(self.announced_length, self._tokens.num_tokens)

    @property
    def num_steps_left(self) -> int:
        """How many more steps are expected; 0 for a session that may not grow."""
        num_tokens = self._tokens.num_tokens
        expected = self.announced_length - num_tokens
        return expected if expected > 0 else min(OPEN_ENDED_STEPS, self._max_length - num_tokens)

    async def over(self, span: Span, excluded: Set[Holding]) -> Route:
        """Servers for a whole ring. Raises as `Chain.route` does."""
        return await self._chain.route(span, excluded, needs=self._needs(span))

    async def instead_of(self, share: Share, lane: Lane, excluded: Set[Holding]) -> Route:
        """Servers for the blocks of one that stands between others. Raises as `Chain.route` does."""
        span, (before, after) = share.hop.span, _neighbours(share, lane)
        return await self._chain.route(span, excluded, needs=self._needs(span), before=before, after=after)

    def price(self, share: Share, lane: Lane) -> Route:
        """What a step costs on a server that stands between others."""
        before, after = _neighbours(share, lane)
        return self._chain.price((share.hop,), needs=self._needs(share.hop.span), before=before, after=after)

    def lane(self, route: Route, history: History, news: Callable[[], None]) -> Lane:
        """The servers of a route, on which nothing is open yet; `history` are the inputs of the first."""
        return Lane(
            self._chain,
            self._tokens,
            self._tuning,
            route.hops,
            history,
            expected_length=lambda: self.expected_length,
            outputs=Nowhere(),
            news=news,
        )

    def _needs(self, span: Span) -> Needs:
        num_tokens = self._tokens.num_tokens
        return Needs(
            step_tokens=self.batch_size,
            prompt_tokens=self.batch_size * num_tokens,
            num_steps=max(1, self.num_steps_left),
            needed_tokens=self.batch_size * self.expected_length,
            head=self._chain.config.remote_head and span.end == self._chain.model.num_blocks,
            dtype=str(self._tokens.like.dtype).removeprefix("torch.") if num_tokens else None,
        )


def _neighbours(share: Share, lane: Lane) -> tuple[ServerInfo | None, ServerInfo | None]:
    """The servers before and after one in the ring; None where that is the client."""
    index = lane.shares.index(share)
    before = lane.shares[index - 1].hop.server if index else None
    after = lane.shares[index + 1].hop.server if index + 1 < len(lane.shares) else None
    return before, after
