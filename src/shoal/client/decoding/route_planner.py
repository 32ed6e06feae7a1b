"""What a session asks of servers, and which it could be on: for all of its blocks, or in the place of one of them."""

from __future__ import annotations

from collections.abc import Callable, Set

from shoal.client.decoding.outputs import NoOutputs
from shoal.client.decoding.pipeline import Pipeline
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.history.history import History
from shoal.client.swarm.swarm import Holding, Swarm
from shoal.model.peft.factors import ActiveAdapters
from shoal.peers import ServerInfo
from shoal.policy.routing.route import Needs, Route
from shoal.spans import Span

OPEN_ENDED_STEPS = 128
"""So many more steps are expected of a session that has got as long as anybody has said that it would."""


class RoutePlanner:
    """Finds routes for what a session holds, and for what it is still going to hold."""

    def __init__(
        self,
        swarm: Swarm,
        tokens: SessionInputs,
        tuning: ActiveAdapters,
        *,
        batch_size: int,
        max_length: int,
        announced_length: int,
    ) -> None:
        self.batch_size = batch_size
        self.announced_length = announced_length
        self._max_length = max_length
        self._swarm = swarm
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

    async def whole_route(self, span: Span, excluded: Set[Holding]) -> Route:
        """Servers for a whole ring. Raises as `Swarm.route` does."""
        return await self._swarm.route(span, excluded, needs=self._needs(span))

    async def replacement(self, stage: Stage, pipeline: Pipeline, excluded: Set[Holding]) -> Route:
        """Servers for the blocks of one that stands between others. Raises as `Swarm.route` does."""
        span, (upstream, downstream) = stage.hop.span, _neighbours(stage, pipeline)
        return await self._swarm.route(
            span, excluded, needs=self._needs(span), upstream=upstream, downstream=downstream
        )

    def price(self, stage: Stage, pipeline: Pipeline) -> Route:
        """What a step costs on a server that stands between others."""
        upstream, downstream = _neighbours(stage, pipeline)
        return self._swarm.price(
            (stage.hop,), needs=self._needs(stage.hop.span), upstream=upstream, downstream=downstream
        )

    def pipeline(self, route: Route, history: History, notify: Callable[[], None]) -> Pipeline:
        """The servers of a route, on which nothing is open yet; `history` are the inputs of the first."""
        return Pipeline(
            self._swarm,
            self._tokens,
            self._tuning,
            route.hops,
            history,
            expected_length=lambda: self.expected_length,
            outputs=NoOutputs(),
            notify=notify,
        )

    def _needs(self, span: Span) -> Needs:
        num_tokens = self._tokens.num_tokens
        return Needs(
            step_tokens=self.batch_size,
            prompt_tokens=self.batch_size * num_tokens,
            num_steps=max(1, self.num_steps_left),
            needed_tokens=self.batch_size * self.expected_length,
            head=self._swarm.config.remote_head and span.end == self._swarm.model.num_blocks,
            dtype=str(self._tokens.like.dtype).removeprefix("torch.") if num_tokens else None,
        )


def _neighbours(stage: Stage, pipeline: Pipeline) -> tuple[ServerInfo | None, ServerInfo | None]:
    """The servers before and after one in the ring; None where that is the client."""
    index = pipeline.stages.index(stage)
    upstream = pipeline.stages[index - 1].hop.server if index else None
    downstream = pipeline.stages[index + 1].hop.server if index + 1 < len(pipeline.stages) else None
    return upstream, downstream
