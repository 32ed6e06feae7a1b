"""What a client owes its servers: it counts what they compute for it, and acknowledges that now and then.

The client counts what it has received itself, so it never signs more. It signs as the first server of its machine, if
there is one, and otherwise with a temporary key, by which it is not known again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from shoal.concurrency import on_thread
from shoal.ledgers.given_ledger import to_present
from shoal.ledgers.ledger_place import LedgerPlace
from shoal.ledgers.own_servers import own_servers
from shoal.ledgers.statements import DELEGATION_SECONDS, acknowledge, delegate
from shoal.ledgers.taken_ledger import TakenLedger
from shoal.net.identity import Identity, public_key
from shoal.policy.contribution.credit import MILLION, parameter_tokens, period_of
from shoal.protocol import MAX_WORK, Acknowledge, Introduce
from shoal.spans import Span

ACKNOWLEDGED_TOKENS = 256
"""The tokens after which a server is sent an acknowledgement: it costs a signature and a small file."""
REFRESH_SECONDS = 600.0
"""How long an introduction is used before it is made again, from newer files."""


class Tabs:
    """What one model's client owes, by server. `block_parameters` are the numbers of parameters of its blocks.

    `peer` is the client's id on the network. Files are read and written on threads.
    """

    def __init__(
        self,
        place: LedgerPlace,
        peer: str,
        block_parameters: Sequence[int],
        *,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._place = place
        self._peer = peer
        self._block_parameters = tuple(block_parameters)
        self._unix_time = unix_time
        self._ledger = TakenLedger(place.folder)
        self._own: tuple[Identity, ...] | None = None  # once they were read
        self._temporary = Identity.temporary()
        self._signed: dict[tuple[str, int], int] = {}  # with the temporary key, by server and week
        self._signing = threading.Lock()  # held while an acknowledgement is written down
        self._counting = threading.Lock()  # held for no longer than it takes to count
        self._owed: dict[str, float] = {}  # by server, in parameter-tokens
        self._begun: dict[str, int] = {}  # by server: how many acknowledgements were begun
        self._told: dict[str, int] = {}  # by server: the number of the latest that was sent
        self._introduction: tuple[float, Introduce | None] | None = None  # and when it was made

    def open(self, server: str) -> Tab | None:
        """The tab at a server; `None` for a peer that cannot be named in a signed statement."""
        return Tab(self, server) if public_key(server) is not None else None

    def parameter_tokens(self, num_tokens: int, span: Span) -> int:
        """The work of computing tokens through the blocks of a span."""
        return parameter_tokens(self._block_parameters, num_tokens, span)

    def owe(self, server: str, work: float) -> None:
        """A server has computed something for this client."""
        with self._counting:
            self._owed[server] = self._owed.get(server, 0.0) + work

    async def introduction(self, server: str) -> Introduce | None:
        """What a server is told of this machine's servers; `None` if there are none, or if it is one of them."""
        made_at, introduction = self._introduction or (float("-inf"), None)
        if self._unix_time() - made_at > REFRESH_SECONDS:
            introduction = await on_thread(self._introduce)
            self._introduction = self._unix_time(), introduction
        return None if self._is_own(server) else introduction

    async def acknowledgement(self, server: str) -> tuple[int, Acknowledge | None]:
        """The acknowledgement of all that a server has computed so far; `None` if it has been `sent` already.

        The number is that by which `sent` names it: over other connections, later ones may be on their way. A caller
        that stops waiting loses nothing: the next one has all of it.
        """
        number = self._begun.get(server, 0)
        if self._owed.get(server, 0.0) < MILLION and number == self._told.get(server, 0):
            return number, None
        self._begun[server] = number = number + 1
        return number, await on_thread(partial(self._acknowledge, server))

    def sent(self, server: str, number: int) -> None:
        """A server was sent the acknowledgement of this number."""
        self._told[server] = max(number, self._told.get(server, 0))

    def _is_own(self, server: str) -> bool:
        return any(server == each.peer for each in self._own or ())

    def _introduce(self) -> Introduce | None:
        own = self._servers()
        if not own:
            return None
        now = self._unix_time()
        peers = tuple(each.peer for each in own)
        return Introduce(
            delegations=tuple(delegate(each, self._peer, until=int(now) + DELEGATION_SECONDS) for each in own),
            acknowledgements=to_present(self._place.folder, peers, now=period_of(now)),
        )

    def _acknowledge(self, server: str) -> Acknowledge | None:
        own, now = self._servers(), period_of(self._unix_time())
        if self._is_own(server):  # what a machine does for itself earns nothing elsewhere
            return None
        with self._signing:  # an earlier one may still be written down, though its caller has gone
            work = self._taken(server)
            if own:
                signer, total = own[0], self._ledger.add(server, work, client=own[0].peer, now=now)
            else:
                self._ledger.add(server, work, client="", now=now)
                self._signed[server, now] = total = min(self._signed.get((server, now), 0) + work, MAX_WORK - 1)
                signer = self._temporary
        if not total:  # a week has just begun
            return None
        return Acknowledge(acknowledgement=acknowledge(signer, server, period=now, work=total))

    def _taken(self, server: str) -> int:
        """What is owed in whole units, which is not owed any more."""
        with self._counting:
            work, self._owed[server] = divmod(self._owed.get(server, 0.0), MILLION)
        return int(work)

    def _servers(self) -> tuple[Identity, ...]:
        if self._own is None:
            self._own = own_servers(self._place)
        return self._own


class Tab:
    """What a client owes one server, over one connection. `due` is set when it is time to acknowledge it."""

    def __init__(self, tabs: Tabs, server: str) -> None:
        self.due = asyncio.Event()
        self._tabs = tabs
        self._server = server
        self._num_tokens = 0
        self._number = 0  # of its latest acknowledgement

    def add(self, num_tokens: int, span: Span, *, times: int = 1) -> None:
        """The server has computed tokens through the blocks of a span, or what costs `times` as much."""
        self._tabs.owe(self._server, times * self._tabs.parameter_tokens(num_tokens, span))
        self._num_tokens += num_tokens
        if self._num_tokens >= ACKNOWLEDGED_TOKENS:
            self.due.set()

    async def introduction(self) -> Introduce | None:
        """What the server is told at the beginning, if anything."""
        return await self._tabs.introduction(self._server)

    async def acknowledgement(self) -> Acknowledge | None:
        """What the server is told now; `None` if nothing is new. The sender then calls `sent`."""
        self._num_tokens = 0
        self.due.clear()
        self._number, message = await self._tabs.acknowledgement(self._server)
        return message

    def sent(self) -> None:
        """The server was sent the acknowledgement."""
        self._tabs.sent(self._server, self._number)
