"""Which servers a session could use: for all of its blocks, or in the place of one server."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace

from shoal.client.decoding.outputs import NoOutputs
from shoal.client.decoding.pipeline import Pipeline
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.history.history import History
from shoal.client.swarm.known.directory_cache import Holding
from shoal.client.swarm.swarm import Swarm
from shoal.model.peft.factors import ActiveAdapters
from shoal.peers import ServerInfo
from shoal.policy.routing.route import Hop, Needs, Route
from shoal.spans import Span

OPEN_ENDED_STEPS = 128
"""The steps that are expected of a session which has reached its announced length and may grow on."""


class RoutePlanner:
    """Finds routes for the tokens that a session has, and for those that it is expected to get.

    `announced_length` is the number of tokens that the caller expects, `max_length` the most that it allows.
    """

    def __init__(
        self,
        swarm: Swarm,
        inputs: SessionInputs,
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
        self._inputs = inputs
        self._tuning = tuning

    @property
    def expected_length(self) -> int:
        """For how many tokens a server needs room: those that the caller expects, and at least the present ones."""
        return max(self.announced_length, self._inputs.num_tokens)

    @property
    def num_steps_left(self) -> int:
        """How many more steps are expected; 0 for a session that may not grow."""
        num_tokens = self._inputs.num_tokens
        expected = self.announced_length - num_tokens
        return expected if expected > 0 else min(OPEN_ENDED_STEPS, self._max_length - num_tokens)

    async def whole_route(self, span: Span, excluded: Set[Holding]) -> Route:
        """A route through all blocks of `span`. Raises as `Swarm.route` does."""
        return await self._swarm.route(span, excluded, needs=self._needs(span))

    async def replacement(
        self, stage: Stage, pipeline: Pipeline, excluded: Set[Holding], *, rather_confirmed: bool = False
    ) -> Route:
        """A route through the blocks of one stage, between its neighbors. Raises as `Swarm.route` does."""
        span, (upstream, downstream) = stage.hop.span, _neighbors(stage, pipeline)
        return await self._swarm.route(
            span,
            excluded,
            needs=self._needs(span),
            upstream=upstream,
            downstream=downstream,
            rather_confirmed=rather_confirmed,
        )

    async def route_of_others(self, span: Span, peers: Set[str], *, head: bool) -> Route:
        """A route over servers other than these, for tokens that are known. Raises as `Swarm.route` does."""
        needed_tokens = self.batch_size * self._inputs.num_tokens
        needs = replace(self._needs(span), num_steps=1, head=head, needed_tokens=needed_tokens)
        await self._swarm.servers.check_held(span, self._swarm.servers.holdings(peers), needs)
        return await self._swarm.route_of_others(span, peers, needs=needs)

    def route_of_one(self, server: ServerInfo, span: Span) -> Route:
        """The route over one server."""
        return self._swarm.price((Hop(server, span),), needs=self._needs(span))

    def price(self, stage: Stage, pipeline: Pipeline) -> Route:
        """The present hop of a stage as a route, with what a step costs on it."""
        upstream, downstream = _neighbors(stage, pipeline)
        return self._swarm.price(
            (stage.hop,), needs=self._needs(stage.hop.span), upstream=upstream, downstream=downstream
        )

    def excess_seconds(self, stage: Stage) -> float:
        """The seconds by which a step takes longer on a stage than its server announces."""
        return self._swarm.measurements.excess_seconds(stage.hop, self.batch_size)

    def pipeline(
        self, route: Route, history: History, notify: Callable[[], None], *, end: int | None = None
    ) -> Pipeline:
        """A pipeline over a route, on which nothing is open yet; `history` has the inputs of the first server.

        It may be for the tokens before an `end` only.
        """
        return Pipeline(
            self._swarm,
            self._inputs,
            self._tuning,
            route.hops,
            history,
            expected_length=lambda: self.expected_length if end is None else end,
            outputs=NoOutputs(),
            notify=notify,
            end=end,
        )

    def _needs(self, span: Span) -> Needs:
        num_tokens = self._inputs.num_tokens
        return Needs(
            step_tokens=self.batch_size,
            prompt_tokens=self.batch_size * num_tokens,
            num_steps=max(1, self.num_steps_left),
            needed_tokens=self.batch_size * self.expected_length,
            head=self._swarm.config.remote_head and span.end == self._swarm.model.num_blocks,
            dtype=str(self._inputs.like.dtype).removeprefix("torch.") if num_tokens else None,
        )


def _neighbors(stage: Stage, pipeline: Pipeline) -> tuple[ServerInfo | None, ServerInfo | None]:
    """The servers before and after a stage in the ring; None where that is the client."""
    index = pipeline.stages.index(stage)
    upstream = pipeline.stages[index - 1].hop.server if index else None
    downstream = pipeline.stages[index + 1].hop.server if index + 1 < len(pipeline.stages) else None
    return upstream, downstream
