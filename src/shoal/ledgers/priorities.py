"""Which clients a server serves first, when there is a queue: those that act for peers with credit.

Credit is of *accounts*, the identities of servers. A payer, who requests count for, has the credit of the accounts that
its open streams act for. All that is computed for it is charged to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from shoal.ledgers.given_ledger import GivenLedger
from shoal.ledgers.statements import is_genuine, is_valid_delegation
from shoal.ledgers.taken_ledger import TakenLedger
from shoal.policy.contribution.credit import MILLION, counts, credits_of, parameter_tokens, period_of
from shoal.policy.contribution.priority import charged, weight_of
from shoal.protocol import Acknowledgement, Introduce
from shoal.spans import Span

log = logging.getLogger(__name__)

MAX_CLAIMS = 1024
"""The claims that a server remembers: what contacts have acknowledged to others. The smallest are dropped."""
MAX_ACCOUNTS = 8
"""The accounts behind one payer. More than that are ignored."""
SAVE_SECONDS = 20.0


class Priorities:
    """The credit of a server's clients, and the ledger of what it gives. `peer` is the server's id.

    Without a `folder` it knows nothing, and all weights are 1. The ledger of what the machine's own clients have taken
    is in the same folder.
    """

    def __init__(
        self, folder: Path | None = None, peer: str = "", *, unix_time: Callable[[], float] = time.time
    ) -> None:
        self._block_parameters: Sequence[int] = ()
        self._peer = peer
        self._unix_time = unix_time
        self._given = None if folder is None else GivenLedger(folder, peer)
        self._taken = None if folder is None else TakenLedger(folder)
        self._claims: dict[tuple[str, str, int], int] = {}  # by contact, account and week
        self._taken_from: dict[str, float] = {}  # what peers have computed for this machine's clients
        self._credits: dict[str, float] = {}
        self._accounts: dict[str, Counter[str]] = {}  # by payer, with how many streams act for each

    @property
    def is_on(self) -> bool:
        """Whether there is a ledger."""
        return self._given is not None

    # -- what the engine and the streams ask ---------------------------------------------------------------------------

    def weight_of(self, payer: str) -> float:
        """The weight of a payer at this moment."""
        if self._given is None or payer not in self._accounts:
            return 1.0
        credits = self._credits_behind(payer)
        now = self._now
        return weight_of(sum(credits.values()), sum(self._given.consumed(each, now=now) for each in credits))

    def learn_blocks(self, parameters: Sequence[int]) -> None:
        """The model's blocks have these numbers of parameters. Before that, work counts nothing."""
        self._block_parameters = parameters

    def work(self, num_tokens: int, span: Span) -> float:
        """The work of computing tokens through the blocks of a span, in millions of parameter-tokens."""
        return parameter_tokens(self._block_parameters, num_tokens, span) / MILLION

    def served(self, payer: str, work: float) -> None:
        """The server has computed something for a payer."""
        if self._given is not None and payer in self._accounts:
            for account, part in charged(self._credits_behind(payer), work).items():
                self._given.consume(account, part, now=self._now)

    async def introduce(self, client: str, payer: str, said: Introduce) -> tuple[str, ...]:
        """A client says which servers it acts for. Returns those that it does, for `leave`; others are ignored."""
        if self._given is None or self._taken is None:
            return ()
        accounts, claims, self._taken_from = await asyncio.to_thread(
            _checked, self._taken, self._peer, client, said, self._unix_time()
        )
        for statement in claims:
            key = (statement.client, statement.server, statement.period)
            self._claims[key] = max(statement.work, self._claims.get(key, 0))
        self._settle()
        behind = self._accounts.setdefault(payer, Counter())
        entered = tuple(each for each in accounts if each in behind or len(behind) < MAX_ACCOUNTS)
        behind.update(entered)
        if not behind:
            del self._accounts[payer]
        return entered

    def leave(self, payer: str, accounts: Sequence[str]) -> None:
        """A stream that acted for these accounts has ended."""
        behind = self._accounts.get(payer)
        if behind is not None:
            behind.subtract(accounts)
            self._accounts[payer] = +behind
            if not self._accounts[payer]:
                del self._accounts[payer]

    async def acknowledged(self, statement: Acknowledgement, computed: float) -> None:
        """A client acknowledges what this server has computed for it: `computed`, since the last time."""
        if self._given is None or statement.server != self._peer:
            return
        if not await asyncio.to_thread(is_genuine, statement):
            log.debug("an acknowledgement that %s has not signed", statement.client)
            return
        self._given.take(statement, computed, now=self._now)

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """While this is entered, the ledger is read and written."""
        if self._given is None:
            yield
            return
        await asyncio.to_thread(self._given.load)
        saving = asyncio.create_task(self._save_now_and_then(self._given), name="shoal-ledger")
        try:
            yield
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
            self._given.save(self._given.copy())

    # -- how it knows --------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> int:
        return period_of(self._unix_time())

    def _credits_behind(self, payer: str) -> dict[str, float]:
        accounts = self._accounts.get(payer, ())
        return {each: credit for each in accounts if (credit := self._credits.get(each, 0.0)) > 0}

    def _settle(self) -> None:
        """Compute the credits again."""
        now, taken = self._now, self._taken_from
        kept = [each for each in self._claims.items() if each[0][0] in taken and counts(each[0][2], now=now)]
        kept.sort(key=lambda item: -item[1])
        self._claims = dict(kept[:MAX_CLAIMS])
        claims: dict[tuple[str, str], float] = {}
        for (contact, account, _), work in self._claims.items():
            claims[contact, account] = claims.get((contact, account), 0.0) + work
        self._credits = credits_of(taken, claims)

    async def _save_now_and_then(self, ledger: GivenLedger) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            if ledger.has_changed:
                await asyncio.to_thread(ledger.save, ledger.copy())


Checked = tuple[tuple[str, ...], tuple[Acknowledgement, ...], dict[str, float]]


def _checked(ledger: TakenLedger, own: str, client: str, said: Introduce, now: float) -> Checked:
    """Of what a client says: the servers that it acts for, and what contacts acknowledge to them. Runs on a thread.

    Contacts are the peers in the ledger of what this machine has taken, which is read and returned too. What others
    have signed is not even checked.
    """
    period = period_of(now)
    taken = ledger.given_by(now=period)
    valid = (each.by for each in said.delegations if each.by != own and is_valid_delegation(each, client, now=now))
    accounts = tuple(dict.fromkeys(valid))
    claims = tuple(
        each
        for each in said.acknowledgements
        if each.client in taken and each.server in accounts and counts(each.period, now=period) and is_genuine(each)
    )
    return accounts, claims, taken
