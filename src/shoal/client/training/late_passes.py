"""Second servers for a pass that is late: the first answer counts, as with the steps of sessions.

A server that answers pings and says that it works may give nothing for as long as it likes. So a pass that is late
(`shoal.policy.lateness`) is computed by other servers too, while the first is still waited for. They compute it as any
pass: in a ring, audited, and, if they are late themselves, with others beside them.

Of the passes that are on their way to one server, one at a time is computed twice. If the server answers any of them,
the others have time again. If it answers none until one was computed elsewhere, all are.

A sum of gradients that is late, of passes that a server has computed before, is computed by others in the same way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from shoal.client.swarm.swarm import Swarm
from shoal.client.swarm.trials import wait_for_others
from shoal.client.training.server_passes import AskedServer
from shoal.concurrency import now, owned_task
from shoal.errors import SwarmError, UnsupportedOperation
from shoal.policy.lateness import MOST_TRIED, LateButFirst, after_late_but_first, pass_late_at, result_late_at
from shoal.policy.routing.route import Hop, Needs

log = logging.getLogger(__name__)

Inputs = TypeVar("Inputs")
Answer = TypeVar("Answer")
Computed = TypeVar("Computed")

TRIAL_SECONDS = 2.0
"""How long servers are tried when a second one is late too. After that, the next one is chosen among all."""
LOOK_SECONDS = 1.0
"""How often a client looks whether a server has failed or was overtaken that has results for it."""
RETRY_SECONDS = 3.0
"""How soon other servers are sought again if there were none, or they have failed."""


@dataclass
class _Server:
    """What is known of a server: when it answered a pass last, and when another one was faster.

    `turn` is held by the one pass that others compute too.
    """

    answered_at: float = float("-inf")
    overtaken_at: float = float("-inf")
    late_but_first: LateButFirst | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class LatePasses:
    """Which servers are late with the passes of one client."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._servers: dict[str, _Server] = defaultdict(_Server)

    def race(
        self,
        asked: AskedServer[Inputs, Answer],
        compute: Callable[[], Awaitable[Computed]],
        *,
        late: Set[str],
        results_since: float | None = None,
    ) -> PassRace[Inputs, Answer, Computed]:
        """A race between a server that was asked, and others that `compute` the same. These peers are `late` before.

        With `results_since`, the server is asked for results of passes that it has computed since then. It is late
        sooner if it has failed, or was overtaken, since the last of them (`shoal.policy.lateness.result_late_at`).
        """
        return PassRace(self._swarm, self._servers[asked.peer], asked, compute, late, results_since)

    async def before_others(self, hop: Hop, like: torch.Tensor | None, late: Set[str], needs: Needs) -> None:
        """Before others than the `late` servers compute a pass in the blocks of `hop`.

        The second server that is late is a reason to find out which servers compute anything at all, with hidden states
        `like` [B, T, D] if there are any. Raises `MissingBlocks` if no others are known.
        """
        servers = self._swarm.servers
        await servers.check_held(hop.span, servers.holdings(late), needs)
        if len(late) > 1 and like is not None:
            try:
                async with asyncio.timeout(TRIAL_SECONDS):
                    await wait_for_others(self._swarm, hop.server, hop.span, like)
            except TimeoutError:
                log.debug("no others have computed a token in blocks %s", hop.span)


class PassRace(Generic[Inputs, Answer, Computed]):
    """One server that was asked for a pass, and others that compute it too if it is late.

    `others` is what they have computed, if they were faster.
    """

    def __init__(
        self,
        swarm: Swarm,
        server: _Server,
        asked: AskedServer[Inputs, Answer],
        compute: Callable[[], Awaitable[Computed]],
        late: Set[str],
        results_since: float | None,
    ) -> None:
        self.others: Computed | None = None
        self._swarm = swarm
        self._server = server
        self._asked = asked
        self._compute = compute
        self._late = late
        self._results_since = results_since
        self._began_at = now()
        self._others_began_at = float("inf")

    async def answer(self, inputs: Inputs) -> Answer | None:
        """What the server answers to these inputs. None if it has to be asked once more, or others were faster.

        Raises `PeerError`s.
        """
        self._began_at = now()
        async with owned_task(self._asked.answer(inputs)) as answering, owned_task(self._others()) as racing:
            await asyncio.wait({answering, racing}, return_when=asyncio.FIRST_COMPLETED)
            if racing.done():
                self.others = racing.result()
                return None
            found = answering.result()
            if found is not None:
                self._note_answer()  # before another pass has its turn
            return found

    async def _others(self) -> Computed:
        """What others compute, once the server is late. If there are none, or they fail, they are sought again."""
        while True:
            await self._until_late()
            try:
                async with self._server.turn:
                    if self._late_at() > now():  # it has answered another pass meanwhile
                        continue
                    if not self._is_overtaken():
                        return await self._computed()
                return await self._computed()  # and so do all other passes that are on their way to it
            except (SwarmError, UnsupportedOperation) as failure:
                log.info("%s", failure)
            await asyncio.sleep(RETRY_SECONDS)

    async def _computed(self) -> Computed:
        self._others_began_at = now()
        log.info("%s is late with a pass: asking another server too", self._asked.peer)
        found = await self._compute()
        self._note_overtaken()  # before another pass has its turn
        return found

    async def _until_late(self) -> None:
        if len(self._late) >= MOST_TRIED:
            await asyncio.Event().wait()
        while True:
            left = self._late_at() - now()
            if left <= 0:
                return
            await asyncio.sleep(left if self._results_since is None else min(left, LOOK_SECONDS))

    def _is_overtaken(self) -> bool:
        """Whether others were faster with another pass that the server was asked for at the same time."""
        since = self._began_at if self._results_since is None else self._results_since
        return self._server.overtaken_at > max(since, self._server.answered_at)

    def _late_at(self) -> float:
        if self._results_since is None:
            if self._is_overtaken():
                return self._server.overtaken_at
        elif self._is_overtaken() or self._swarm.servers.is_avoided(self._asked.peer):
            round_trip = self._swarm.measurements.round_trips().get(self._asked.peer)
            return result_late_at(self._began_at, round_trip)
        sent_at = self._asked.turn.awaiting_since  # None while it is sent, and its adapters
        return pass_late_at(
            now() if sent_at is None else max(self._began_at, sent_at),
            self._asked.usual_seconds,
            answered_at=self._server.answered_at,
            known=self._server.late_but_first,
            is_proven=self._swarm.measurements.is_confirmed(self._asked.peer),
        )

    def _note_answer(self) -> None:
        server, time = self._server, now()
        if self._others_began_at <= time:
            server.late_but_first = after_late_but_first(server.late_but_first, since=self._began_at, now=time)
        server.answered_at = time
        self._swarm.measurements.record_computed(self._asked.peer)

    def _note_overtaken(self) -> None:
        """Others were faster. That is one accident for all the passes that were on their way to the server.

        It is none if the server has answered another of them meanwhile: it has much to do, and does it.
        """
        if not self._is_overtaken() and self._server.answered_at < self._others_began_at:
            self._swarm.servers.record_overtaken(self._asked.peer, now() - self._began_at)
            self._server.overtaken_at = now()
